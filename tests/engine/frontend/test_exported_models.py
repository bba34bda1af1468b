"""Models as PyTorch's exporters write them (`tests/fixtures/export.py`): read, computed, and compared with PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.frontend import read, read_model
from engine.ir import ops
from engine.ir.dim import symbols
from tests.engine.ir_interpreter import run

FIXTURES = Path(__file__).parents[2] / "fixtures"
EVERY = sorted(path.stem for path in FIXTURES.glob("*.onnx"))
MODELS = [name for name in EVERY if name.endswith(("_legacy", "_dynamo"))]
"""Those that are computed here; `test_exports.py` runs all of them."""
TOLERANCE = 2e-6  # relative L2 error: fp32 roundings of a few layers


def test_there_are_models_of_both_exporters() -> None:
    assert {name.rsplit("_", 1)[1] for name in MODELS} == {"legacy", "dynamo"}


@pytest.mark.parametrize("name", MODELS)
def test_model_matches_pytorch(name: str) -> None:
    graph = read(FIXTURES / f"{name}.onnx")
    graph.validate()
    arrays = np.load(FIXTURES / f"{name}.npz")
    results = run(graph, {value.name: arrays[f"in_{value.name}"] for value in graph.inputs})
    (got,) = results.values()
    want = arrays["out_0"]
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < TOLERANCE


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_opaque_and_only_input_sizes_are_symbols(name: str) -> None:
    graph = read(FIXTURES / f"{name}.onnx")
    assert not [node.op.name for node in graph.nodes if isinstance(node.op, ops.Opaque)]
    inputs = symbols(*(dim for value in graph.inputs for dim in value.shape))
    is_text = len(graph.inputs) > 1
    assert {symbol.removesuffix("_size").removesuffix("_length") for symbol in inputs} == (
        {"batch", "sequence"} if is_text else {"batch"}
    )
    for node in graph.nodes:
        assert symbols(*(dim for value in node.outputs for dim in value.shape)) <= inputs


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("bert", "distilbert"))])
def test_masks_of_encoders_are_views_of_the_mask_input(name: str) -> None:
    """No ranges, no lookups by position: the mask reaches the attention by reshaping, casting and choosing only."""
    graph = read(FIXTURES / f"{name}.onnx")
    assert not any(isinstance(node.op, ops.ShapeTensor) for node in graph.nodes)
    assert [node.inputs[0].is_constant for node in graph.nodes if isinstance(node.op, ops.Gather)] == [True]


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("bert", "roberta", "gpt2"))])
def test_other_sizes_than_the_exported_ones(name: str) -> None:
    """A row alone gives what it gives in the batch, and padding changes nothing."""
    graph = read(FIXTURES / f"{name}.onnx")
    arrays = np.load(FIXTURES / f"{name}.npz")
    ids, mask, want = arrays["in_ids"], arrays["in_mask"], arrays["out_0"]
    alone = next(iter(run(graph, {"ids": ids[1:], "mask": mask[1:]}).values()))
    np.testing.assert_allclose(alone, want[1:], atol=1e-5)
    short = next(iter(run(graph, {"ids": ids[:1, :5], "mask": mask[:1, :5]}).values()))
    np.testing.assert_allclose(short, want[:1, :5], atol=1e-5)


def test_what_the_file_says_about_itself() -> None:
    _, info = read_model(FIXTURES / "bert_legacy.onnx")
    assert info.producer == "pytorch"
    assert info.opsets == {"": 17}
