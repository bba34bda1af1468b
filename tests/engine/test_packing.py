"""Models that run on packed tokens, on the CPU: the same numbers as padded, chosen by the mask of each batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tokenizers

import engine
from engine.cli import main
from engine.packing import LEAST_SAVING, prefix_lengths, token_bucket
from tests.engine.passes.encoders import EMBEDDING, ROWS, encoder, in_float32, lengths_mask

FIXTURES = Path(__file__).parent.parent / "fixtures"
TOLERANCE = 1e-5  # largest difference; the numbers are of the order of 1
SENTENCES = [
    "A man is eating food.",
    "Yes.",
    "The stock market fell sharply on Monday as investors weighed the chance of another rise in interest rates.",
    "Where is the nearest station?",
    "She had been walking along the river for nearly an hour before she noticed that the dog, which had followed her "
    "out of the village and over two fields, was no longer behind her but sat on the other bank, looking pleased.",
    "Two plus two is four.",
    "Parsers read text; printers write it.",
    "It rained.",
    "The committee will meet again next week to discuss the budget, the new building, and whom to invite.",
    "Bread, butter, cheese.",
    "Nobody could say afterwards who had opened the window, but by the time that the guests arrived, snow lay on the "
    "carpet and on the piano.",
    "How much does it cost to send a parcel of two kilograms abroad?",
]

Feeds = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def minilm(all_minilm_l6_v2: Path) -> Iterator[tuple[engine.Model, engine.Model]]:
    """Packed and padded."""
    path = all_minilm_l6_v2 / "1" / "model.onnx"
    with (
        engine.load(path, device="cpu", packed=True) as packed,
        engine.load(path, device="cpu", packed=False) as padded,
    ):
        yield packed, padded


@pytest.fixture(scope="module")
def sentences(all_minilm_l6_v2: Path) -> Feeds:
    tokenizer = tokenizers.Tokenizer.from_file(str(all_minilm_l6_v2 / "tokenizer.json"))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(SENTENCES)
    ids, mask = (np.array([getattr(e, kind) for e in encodings], np.int64) for kind in ("ids", "attention_mask"))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def ran(model: engine.Model) -> dict[str, int]:
    """The sizes of the plan that ran last."""
    return dict(model.plan_profiles()[-1].sizes)


def test_sentences_packed_padded_and_by_onnx_runtime(
    minilm: tuple[engine.Model, engine.Model], sentences: Feeds, all_minilm_l6_v2: Path
) -> None:
    packed, padded = minilm
    real = sentences["attention_mask"] == 1
    got = packed.run(sentences)["last_hidden_state"]
    assert ran(packed) == {"batch": 12, "sequence": real.shape[1], "tokens": token_bucket(int(real.sum()))}
    want = padded.run(sentences)["last_hidden_state"]
    assert np.abs(got - want)[real].max() <= TOLERANCE
    assert not got[~real].any()
    session = onnxruntime.InferenceSession(all_minilm_l6_v2 / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    (other,) = session.run(["last_hidden_state"], sentences)
    assert np.abs(got - other)[real].max() <= TOLERANCE


def test_sentences_take_a_fraction_of_the_flops(minilm: tuple[engine.Model, engine.Model], sentences: Feeds) -> None:
    """FLOPs follow the tokens; those of attention, which is quadratic, even more."""
    packed, padded = minilm
    batch = packed.pack(sentences)
    assert batch is not None
    sizes = {"batch": 12, "sequence": sentences["input_ids"].shape[1]}
    flops = [sum(step.cost.flops for step in model.plan(given).steps)
             for model, given in ((packed, batch.sizes), (padded, sizes))]  # fmt: skip
    assert flops[0] / flops[1] < batch.sizes["tokens"] / sentences["input_ids"].size * 1.01


def test_weights_are_there_once(minilm: tuple[engine.Model, engine.Model], sentences: Feeds) -> None:
    packed, padded = minilm
    for model in minilm:
        model.run(sentences)
        model.run({name: array[:, :4] for name, array in sentences.items()})  # nothing padded
    assert packed.memory()["weights"] == padded.memory()["weights"]


def test_random_lengths_agree(minilm: tuple[engine.Model, engine.Model]) -> None:
    packed, _ = minilm
    rng = np.random.default_rng(0)
    for _ in range(20):
        batch, sequence = int(rng.integers(1, 9)), int(rng.integers(1, 60))
        mask = lengths_mask([int(n) for n in rng.integers(1, sequence + 1, batch)], sequence)
        feeds = {"input_ids": rng.integers(0, 30000, mask.shape), "attention_mask": mask,
                 "token_type_ids": np.zeros_like(mask)}  # fmt: skip
        got, want = (model.run(feeds)["last_hidden_state"] for model in minilm)
        assert np.abs(got - want)[mask == 1].max() <= TOLERANCE
        assert not got[mask == 0].any()
        alone = packed.run({name: array[:1, : mask[0].sum()] for name, array in feeds.items()})["last_hidden_state"]
        assert np.abs(got[0, : mask[0].sum()] - alone[0]).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["vit_dynamo", "convnet_legacy"])
def test_models_of_images_do_not(name: str) -> None:
    with engine.load(FIXTURES / f"{name}.onnx", device="cpu") as model:
        assert model.packed_mask is None
        assert model.packed_size is None
        assert model.why_padded


POOLED = (
    "mu = Unsqueeze(mask, axes_last) mc = Cast<to=11>(mu) hm = Mul(h, mc) a = ReduceSum<keepdims=0>(hm, axes_1)"
    " c0 = ReduceSum<keepdims=0>(mc, axes_1) c = Max(c0, tiny) y = Div(a, c)"
)


@pytest.fixture(scope="module")
def pooled() -> Iterator[tuple[engine.Model, engine.Model]]:
    """Tokens and their masked mean in float32; packed and padded."""
    proto = encoder(tail=f"{POOLED} z = Identity(h)", outputs="double[b,n] y, double[b,s,n] z")
    data = in_float32(proto)
    with (
        engine.load(data, device="cpu", packed=True) as packed,
        engine.load(data, device="cpu", packed=False) as padded,
    ):
        yield packed, padded


MASKS = {
    "prefixes": ([[1, 1, 1, 0, 0, 0, 0, 0], [1] * 8, [1, 0, 0, 0, 0, 0, 0, 0]], True),
    "one row": ([[1, 1, 1, 0, 0, 0, 0, 0]], False),  # 8 tokens either way
    "nothing padded": ([[1] * 8, [1] * 8], False),
    "holes": ([[1, 0, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]], False),
    "padding on the left": ([[0, 0, 0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]], False),
    "an empty row": ([[0] * 8, [1, 1, 0, 0, 0, 0, 0, 0]], False),
    "twos": ([[2, 2, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]], False),
    "minus ones": ([[1, 1, 0, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 0, 0]], False),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_mask_decides_what_runs(pooled: tuple[engine.Model, engine.Model], name: str) -> None:
    rows, is_packed = MASKS[name]
    packed, padded = pooled
    mask = np.array(rows)
    feeds = {"ids": np.random.default_rng(0).integers(0, ROWS, mask.shape), "mask": mask}
    got, want = packed.run(feeds), padded.run(feeds)
    assert ("tokens" in ran(packed)) == is_packed
    assert (packed.pack(feeds) is not None) == (prefix_lengths(mask) is not None)
    np.testing.assert_allclose(got["y"], want["y"], rtol=0, atol=TOLERANCE)
    if prefix_lengths(mask) is None:
        # Not a mask to pack by: everything is the padded graph's, padded positions included.
        np.testing.assert_array_equal(got["z"], want["z"])
    else:
        np.testing.assert_allclose(got["z"], want["z"] * mask[..., None], rtol=0, atol=TOLERANCE)


def test_a_row_has_the_same_result_whatever_shares_its_batch(pooled: tuple[engine.Model, engine.Model]) -> None:
    """Also at padded positions: in a batch with little padding, which runs padded, they are 0, too."""
    packed, _ = pooled
    row = {"ids": np.arange(16)[None] % ROWS, "mask": lengths_mask([13], 16)}
    full = {"ids": np.tile(np.arange(16), (7, 1)) % ROWS, "mask": lengths_mask([16] * 7, 16)}
    short = {"ids": full["ids"], "mask": lengths_mask([2] * 7, 16)}
    results = []
    for others, is_packed in ((full, False), (short, True)):
        results.append(packed.run({name: np.concatenate([row[name], others[name]]) for name in row}))
        assert ("tokens" in ran(packed)) == is_packed
    for name in ("y", "z"):
        np.testing.assert_allclose(results[0][name][0], results[1][name][0], rtol=0, atol=TOLERANCE)
    assert not results[0]["z"][0, 13:].any()


def test_bound_plans_run_packed(minilm: tuple[engine.Model, engine.Model], sentences: Feeds) -> None:
    packed, _ = minilm
    batch = packed.pack(sentences)
    assert batch is not None
    bound = packed.bind(batch.sizes)
    for name, array in bound.inputs.items():
        array[...] = batch.arrays[name]
    bound.launch()
    want = packed.run(sentences)["last_hidden_state"]
    np.testing.assert_allclose(bound.outputs["last_hidden_state"], want, rtol=0, atol=TOLERANCE)
    bound.close()
    with pytest.raises(engine.ShapeError, match="'tokens' must be given"):
        packed.bind({**batch.sizes, "tokens": 0})


def test_figures_are_those_of_packed_runs(minilm: tuple[engine.Model, engine.Model], sentences: Feeds) -> None:
    packed, padded = minilm
    rows, padded_rows = packed.profile(sentences, runs=1), padded.profile(sentences, runs=1)
    assert [row.op for row in rows].count("Attention") == 6
    assert all(row.calls == 1 for row in rows)
    assert sum(row.flops for row in rows) < 0.6 * sum(row.flops for row in padded_rows)
    before = {(s.kernel, s.op): s.flops for s in packed.kernel_stats()}
    packed.run(sentences)
    counted = sum(s.flops - before[s.kernel, s.op] for s in packed.kernel_stats())
    assert counted == sum(row.flops for row in rows)


def test_sizes_beyond_the_model_are_named(minilm: tuple[engine.Model, engine.Model]) -> None:
    """Positions end at 512: in words, as when padded, though no token lies beyond."""
    mask = lengths_mask([3, 4], 600)
    feeds = {"input_ids": mask, "attention_mask": mask, "token_type_ids": 0 * mask}
    for model in minilm:
        with pytest.raises(engine.ShapeError, match="'sequence' is 600, the model takes at most 512"):
            model.run(feeds)


def test_wild_ids_are_named(minilm: tuple[engine.Model, engine.Model]) -> None:
    mask = lengths_mask([3, 4], 32)
    feeds = {"input_ids": mask * 10**6, "attention_mask": mask, "token_type_ids": 0 * mask}
    with pytest.raises(engine.ShapeError, match="input 'input_ids' holds 1000000"):
        minilm[0].run(feeds)


@pytest.mark.parametrize("packed", [False, "off"])
def test_packing_is_switched_off(packed: bool | str) -> None:
    data = in_float32(encoder())
    with engine.load(data, device="cpu", packed=packed) as model:
        assert model.packed_mask is None
        assert model.why_padded == "switched off"
        assert model.pack({"ids": np.zeros((1, 2), np.int64), "mask": np.ones((1, 2), np.int64)}) is None
    with pytest.raises(ValueError, match="packed must be a bool or one of 'auto', 'on', 'off', not 'yes'"):
        engine.load(data, device="cpu", packed="yes")


def test_an_input_with_the_name_of_a_hidden_one() -> None:
    """Names of the model are the model's: hidden inputs and the number of tokens get others."""
    proto = encoder(before=EMBEDDING.replace("e = Add(we, pe)", "e0 = Add(we, pe) e = Add(e0, extra)"),
                    extra=", double[b,tokens,12] extra")  # fmt: skip
    proto.graph.input[2].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    proto.graph.input[2].type.tensor_type.shape.dim[1].dim_param = "s"
    proto.graph.input[2].name = "packed.rows"
    for node in proto.graph.node:
        node.input[:] = ["packed.rows" if name == "extra" else name for name in node.input]
    with engine.load(in_float32(proto), device="cpu") as model:
        mask = lengths_mask([3, 16, 1], 16)
        rng = np.random.default_rng(0)
        feeds = {"ids": rng.integers(0, ROWS, mask.shape), "mask": mask,
                 "packed.rows": rng.standard_normal((3, 16, 12)).astype(np.float32)}  # fmt: skip
        got = model.run(feeds)["y"]
        assert "tokens" in ran(model)
        alone = model.run({name: array[:1, :3] for name, array in feeds.items()})["y"]
        np.testing.assert_allclose(got[:1, :3], alone, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.float32, np.bool_])
def test_prefix_lengths(dtype: type) -> None:
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(1, 10, 40)]
    found = prefix_lengths(lengths_mask(lengths, 9).astype(dtype))
    assert found is not None
    assert found.tolist() == lengths
    for _ in range(200):
        mask = (rng.random((int(rng.integers(1, 4)), int(rng.integers(1, 6)))) < 0.7).astype(dtype)
        is_prefix = all(row[0] and list(row) == sorted(row, reverse=True) for row in mask.tolist())
        assert (prefix_lengths(mask) is not None) == is_prefix


def test_masks_of_other_numbers_are_none_to_pack_by() -> None:
    for wrong in (2.0, 0.5, -1.0, np.nan, np.inf):
        assert prefix_lengths(np.array([[1, wrong, 0]], np.float32)) is None
        assert prefix_lengths(np.array([[wrong, 0, 0]], np.float32)) is None


def test_buckets_grow_with_the_tokens() -> None:
    buckets: Sequence[int] = [token_bucket(n) for n in range(1, 5000)]
    assert all(bucket >= n for n, bucket in enumerate(buckets, start=1))
    assert all(bucket - n < max(8, n / 16) for n, bucket in enumerate(buckets, start=1))
    assert len(set(buckets)) < 110
    assert [token_bucket(bucket) for bucket in buckets] == buckets
    assert 0 < LEAST_SAVING < 0.1


def test_inspect_says_whether_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "encoder.onnx"
    path.write_bytes(in_float32(encoder()))
    assert main(["inspect", str(path), "--device", "cpu", "--size", "b=2", "--size", "s=16", "--size", "tokens=8"]) == 0
    shown = capsys.readouterr().out
    assert "packed  yes, where 'mask' is ones and then zeros in every row" in shown
    assert "packed=True" in shown
    path.write_bytes(in_float32(encoder(tail="y = ReduceMax<keepdims=0>(h, axes_1)", outputs="double[b,n] y")))
    assert main(["inspect", str(path), "--device", "cpu"]) == 0
    assert "packed  no: Reduce" in capsys.readouterr().out
    assert main(["inspect", str(path), "--device", "cpu", "--packed", "off"]) == 0
    assert "packed  no: switched off" in capsys.readouterr().out
    assert main(["inspect", str(path), "--device", "cpu", "--size", "tokens=8"]) == 2


def test_check_knows_what_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, mask = tmp_path / "encoder.onnx", tmp_path / "mask.npy"
    path.write_bytes(in_float32(encoder()))
    np.save(mask, lengths_mask([3, 16, 1], 16))
    given = ["--size", "b=3", "--size", "s=16", "--input", f"mask={mask}"]
    assert main(["check", str(path), "--device", "cpu", *given]) == 0
    assert "ok" in capsys.readouterr().out
