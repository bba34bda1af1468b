"""The default models on the GPU against the CPU target in fp32; what they launch; their memory over many runs."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import engine
from engine.ir import ops
from tests.gpu.conftest import Both, image_feeds, relative_error, token_feeds

pytestmark = pytest.mark.gpu

TOLERANCE = 5e-3  # relative L2, storage in fp16
SAME_ROW = 2e-3  # the same row in a batch of another size: other tiles, other order of sums
RUNS = 10_000


@pytest.fixture(scope="module")
def minilm_packed(all_minilm_l6_v2: Path) -> Iterator[dict[str, engine.Model]]:
    """MiniLM on packed tokens, by precision."""
    models = {
        precision: engine.load(all_minilm_l6_v2 / "1" / "model.onnx", device="cuda", precision=precision, packed=True)
        for precision in ("fp16", "bf16")
    }
    yield models
    for model in models.values():
        model.close()


def test_auto_takes_the_gpu_and_fp16(efficientnet: Both, minilm: Both) -> None:
    for both in (efficientnet, minilm):
        assert both.gpu.device_info.device.startswith("cuda:")
        assert both.gpu.precision == "fp16"
        assert both.gpu.fallback_ops == 0


def test_ceilings_and_what_the_cache_holds(efficientnet: Both, minilm: Both) -> None:
    info = efficientnet.gpu.device_info
    assert 1e13 < info.peak_flops < 1e16 and 1e11 < info.peak_bytes <= info.peak_cache_bytes < 1e14
    assert 1 << 20 < info.cache_bytes < 1 << 30
    rows = efficientnet.gpu.profile(image_feeds(1))
    if info.cache_bytes > 32 << 20:  # 9 MB of weights and small activations stay there
        assert all(row.cached_bytes == row.bytes for row in rows)
    for row in (*rows, *minilm.gpu.profile(token_feeds(32, 128))):
        assert row.roofline < 1.2, row


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_efficientnet_matches_the_cpu(efficientnet: Both, batch: int) -> None:
    assert efficientnet.error(image_feeds(batch)) <= TOLERANCE


@pytest.mark.parametrize(
    ("batch", "sequence"), [*itertools.product([1, 7, 32], [1, 2, 7, 16, 33, 64, 127, 128, 200, 256])]
)
def test_minilm_matches_the_cpu(minilm: Both, batch: int, sequence: int) -> None:
    assert minilm.error(token_feeds(batch, sequence)) <= TOLERANCE


def test_every_length_from_1_to_256_matches_the_cpu(minilm: Both) -> None:
    errors = {length: minilm.error(token_feeds(2, length, length)) for length in range(1, 257, 5)}
    assert all(error <= TOLERANCE for error in errors.values()), errors


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(("batch", "sequence"), [(1, 16), (7, 33), (32, 128), (128, 128), (8, 512)])
def test_minilm_on_packed_tokens_matches_the_cpu(
    minilm_packed: dict[str, engine.Model], minilm: Both, precision: str, batch: int, sequence: int
) -> None:
    model = minilm_packed[precision]
    feeds = token_feeds(batch, sequence, 1)
    feeds["attention_mask"][0, sequence // 2 :] = 0
    got, expected = model.run(feeds), minilm.cpu.run(feeds)
    assert "tokens" in model.plan_profiles()[-1].sizes
    model.clear_padding(expected, feeds)
    error = relative_error(got["last_hidden_state"], expected["last_hidden_state"])
    assert error <= (TOLERANCE if precision == "fp16" else 2e-2)


def test_packed_tokens_take_no_weights_of_their_own(minilm_packed: dict[str, engine.Model], minilm: Both) -> None:
    model = minilm_packed["fp16"]
    model.run(token_feeds(4, 64))
    before = model.memory()["weights"]
    for sequence in (16, 64, 100):
        for batch in (3, 9):
            model.run(token_feeds(batch, sequence))
            model.run(model.sample_feeds({"batch": batch, "sequence": sequence}))
    assert model.memory()["weights"] == before


def test_a_row_is_the_same_in_any_batch(efficientnet: Both, minilm: Both) -> None:
    images = image_feeds(7)
    together = efficientnet.gpu.run(images)["logits"]
    tokens = token_feeds(7, 60)
    hidden = minilm.gpu.run(tokens)["last_hidden_state"]
    for row in range(7):
        alone = efficientnet.gpu.run({"input": images["input"][row : row + 1]})["logits"]
        assert relative_error(together[row : row + 1], alone) <= SAME_ROW
        length = int(tokens["attention_mask"][row].sum())
        cut = {name: array[row : row + 1, :length] for name, array in tokens.items()}
        alone = minilm.gpu.run(cut)["last_hidden_state"]
        assert relative_error(hidden[row : row + 1, :length], alone) <= SAME_ROW


def test_a_run_gives_the_same_bits_again(efficientnet: Both, minilm: Both) -> None:
    for both, feeds in ((efficientnet, image_feeds(7)), (minilm, token_feeds(7, 60))):
        first = both.gpu.run(feeds)
        for _ in range(20):
            again = both.gpu.run(feeds)
            assert all(np.array_equal(again[name], array) for name, array in first.items())


def test_every_kernel_launched_is_ours(efficientnet: Both, minilm: Both) -> None:
    families = {"gemm", "conv", "depthwise", "attention", "norm", "softmax", "pool", "reduce", "pointwise"}
    for both, sizes in ((efficientnet, {"batch": 1}), (minilm, {"batch": 1, "sequence": 16})):
        for _ in range(2):  # the second run of a plan is the first that is timed
            both.gpu.run(both.gpu.sample_feeds(sizes))
        stats = both.gpu.kernel_stats()
        assert {stat.kernel.removesuffix("_direct") for stat in stats} <= families
        assert all(stat.seconds > 0 and stat.launches > 0 for stat in stats)
        plan = both.gpu.plan(sizes)
        assert not any(isinstance(step.op, ops.Opaque) for step in plan.steps)
        assert not any(name in step.name for step in plan.steps for name in (".layout", ".copy")), "a copy is launched"


def test_the_verdict_is_read_from_the_cache(
    all_minilm_l6_v2: Path, minilm: Both, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level("INFO"),
        engine.load(all_minilm_l6_v2 / "1" / "model.onnx", device="cuda", packed=False) as again,
    ):
        assert again.precision == minilm.gpu.precision
    assert "as found before" in caplog.text


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 2e-2), ("tf32", 1e-3), ("fp32", 1e-5)])
def test_other_precisions_match_the_cpu(
    precision: str, bound: float, efficientnet: Both, efficientnet_lite0: Path, minilm: Both, all_minilm_l6_v2: Path
) -> None:
    for both, folder, feeds in (
        (efficientnet, efficientnet_lite0, image_feeds(3)),
        (minilm, all_minilm_l6_v2, token_feeds(3, 50)),
    ):
        with engine.load(
            folder / "1" / "model.onnx", device="cuda", precision=precision, strict=True, packed=False
        ) as model:
            assert model.precision == precision
            got, expected = model.run(feeds), both.cpu.run(feeds)
            assert all(relative_error(got[name], array) <= bound for name, array in expected.items())


@pytest.mark.parametrize("number", [99, 10_000])
def test_a_gpu_that_is_not_there_is_refused(number: int) -> None:
    with pytest.raises(engine.DeviceError, match="does not exist; there is cuda:0"):
        engine.choose_device(f"cuda:{number}")


@pytest.mark.slow
def test_ten_thousand_runs_allocate_nothing_on_the_device(efficientnet: Both, minilm: Both) -> None:
    import cupy

    work = [
        (minilm.gpu, token_feeds(1, 16)),
        (minilm.gpu, token_feeds(7, 33)),
        (efficientnet.gpu, image_feeds(1)),
    ]
    for model, feeds in work * 2:
        model.run(feeds)
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes(), pool.total_bytes(), cupy.cuda.runtime.memGetInfo()[0]
    for i in range(RUNS):
        model, feeds = work[i % len(work)]
        model.run(feeds)
    assert (pool.used_bytes(), pool.total_bytes(), cupy.cuda.runtime.memGetInfo()[0]) == before


def test_out_of_memory_is_an_error_that_leaves_the_model_serving(efficientnet: Both) -> None:
    feeds = image_feeds(1)
    expected = efficientnet.gpu.run(feeds)["logits"]
    with pytest.raises(engine.OutOfMemory):
        efficientnet.gpu.bind({"batch": 400_000})
    assert np.array_equal(efficientnet.gpu.run(feeds)["logits"], expected)


def test_closing_gives_the_memory_back(all_minilm_l6_v2: Path) -> None:
    import cupy

    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    model = engine.load(all_minilm_l6_v2 / "1" / "model.onnx", device="cuda")
    model.run(token_feeds(8, 64))
    assert pool.used_bytes() > before
    model.close()
    gc.collect()
    assert pool.used_bytes() == before
