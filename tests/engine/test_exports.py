"""Encoders as their exporters write them (`tests/fixtures/export.py`), on the CPU: in every spelling the attentions are
recognised and the model runs on packed tokens, or says why it cannot; PyTorch's and ONNX Runtime's numbers come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import engine
from engine.ir.ops import Attention, Softmax
from engine.packing import token_bucket
from tests.engine.passes.encoders import lengths_mask

FIXTURES = Path(__file__).parent.parent / "fixtures"
FILES = sorted(path.stem for path in FIXTURES.glob("*.onnx") if not path.stem.startswith("convnet"))
TOLERANCE = 2e-6  # relative L2 error: fp32 roundings of a few layers
APPROXIMATION = 1e-3  # of GELU by tanh, which ONNX Runtime's optimizer may put in
ATTENTIONS = {"modernbert": 3, "swin": 3}
"""By model; the others have two."""
LENGTHS, WIDTH = [3, 16, 1, 7, 9], 16

IMAGE = "no attention is masked by an input"
BIAS = "its bias is more than a mask of 'attention_mask'"
PADDED = {
    "vit": IMAGE,
    "deit": IMAGE,
    "clip_vision": IMAGE,
    "swin": IMAGE,
    "t5_encoder": BIAS,  # relative positions
    "mpnet": BIAS,
    "modernbert": BIAS,  # a window
    "clip_text_pooled": "looks positions up",  # at an index that is computed from the ids
    "deberta": BIAS,  # three products make the scores
}
"""Models that are not packed, and why."""

Array = np.ndarray[Any, Any]


def architecture(name: str) -> str:
    return name.partition("-")[0].removesuffix("_legacy").removesuffix("_dynamo")


def distance(got: Array, want: Array) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def other_feeds(given: dict[str, Array]) -> dict[str, Array]:
    """Tokens of the given ones in other sizes."""
    mask = next((array for name, array in given.items() if name in ("mask", "attention_mask")), None)
    if mask is None:
        return {name: array[:1] for name, array in given.items()}
    rng = np.random.default_rng(1)
    real = lengths_mask(LENGTHS, WIDTH)
    return {
        name: np.where(real == 1, rng.choice(array[mask == 1], real.shape), array[mask == 0][0])
        for name, array in given.items()
    }


@pytest.mark.parametrize("name", FILES)
def test_exports(name: str) -> None:
    with np.load(FIXTURES / f"{name}.npz") as file:
        arrays = dict(file)
    given = {key.removeprefix("in_"): array for key, array in arrays.items() if key.startswith("in_")}
    results = [arrays[f"out_{i}"] for i in range(len(arrays) - len(given))]
    session = onnxruntime.InferenceSession(FIXTURES / f"{name}.onnx", providers=["CPUExecutionProvider"])
    with engine.load(FIXTURES / f"{name}.onnx", device="cpu") as model:
        count = ATTENTIONS.get(architecture(name), 2)
        found = [isinstance(node.op, Attention) for node in model.graph.nodes].count(True)
        assert found == count
        assert not any(isinstance(node.op, Softmax) for node in model.graph.nodes)
        assert model.fallback_ops == 0
        reason = PADDED.get(architecture(name))
        assert (reason or "") in (model.why_padded or "")
        assert (model.packed_size is None) == (reason is not None)
        bound = APPROXIMATION if "fast_gelu" in name else TOLERANCE
        compare(model, given, results, bound)
        others = other_feeds(given)
        # ONNX Runtime takes angles of rotary embedding for a whole batch only, which PyTorch writes once.
        wanted = session.run(None, others) if name != "llama-sdpa-dynamo-23" else None
        compare(model, others, wanted, TOLERANCE)
        if model.packed_size is not None:
            assert model.plan_profiles()[-1].sizes[model.packed_size] == token_bucket(sum(LENGTHS))


def compare(model: engine.Model, feeds: dict[str, Array], wanted: list[Array] | None, bound: float) -> None:
    """Outputs are `wanted` at real tokens, and 0 at padded ones of a model that runs packed."""
    mask = feeds.get(model.packed_mask or "attention_mask")
    outputs = list(model.run({spec.name: feeds[spec.name] for spec in model.inputs}).values())
    for i, got in enumerate(outputs):
        want = wanted[i] if wanted is not None else got
        assert got.shape == want.shape
        if mask is not None and got.shape[:2] == mask.shape:
            assert model.packed_size is None or not got[mask == 0].any()
            got, want = got[mask == 1], want[mask == 1]
        assert distance(got, want) <= bound
        assert np.isfinite(got).all()


def test_rows_of_a_batch_do_not_depend_on_each_other_where_onnx_runtime_has_no_numbers() -> None:
    with engine.load(FIXTURES / "llama-sdpa-dynamo-23.onnx", device="cpu") as model:
        with np.load(FIXTURES / "llama-sdpa-dynamo-23.npz") as file:
            feeds = other_feeds({key.removeprefix("in_"): file[key] for key in file if key.startswith("in_")})
        (got,) = model.run(feeds).values()
        for row, length in enumerate(LENGTHS):
            (alone,) = model.run({name: array[row : row + 1, :length] for name, array in feeds.items()}).values()
            assert distance(got[row, :length], alone[0]) <= TOLERANCE


def test_every_family_of_spellings_is_there() -> None:
    """Both exporters, both attentions, the opsets, Optimum's files and those of ONNX Runtime's optimizer."""
    spellings = {tuple(name.split("-")[1:4]) for name in FILES if name.startswith("bert-")}
    for opset, exporter in ((11, "legacy"), (13, "legacy"), (17, "legacy"), (18, "dynamo"), (23, "dynamo")):
        assert ("eager", exporter, str(opset)) in spellings
    assert {("sdpa", "legacy", "14"), ("sdpa", "dynamo", "18"), ("sdpa", "dynamo", "23")} <= spellings
    assert len([name for name in FILES if "-optimum-" in name]) >= 3
    assert {architecture(name) for name in FILES if "-ort" in name} >= {"bert", "distilbert", "roberta", "gpt2", "vit"}
    packed = [name for name in FILES if architecture(name) not in PADDED]
    assert len(packed) >= 12
    assert {architecture(name) for name in FILES} >= {"vit", "clip_text", "gpt2", "swin", "distilbert", "roberta"}
