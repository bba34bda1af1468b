"""The list of inverted residuals holds what it says: the distinct ones of two networks that have tiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from benchmarks.cases.block import CASES, BlockCase
from benchmarks.cases.conv import BATCHES
from benchmarks.gpu.steps import step_of, zeros
from engine import frontend, passes
from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.graph import Graph
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.conv_block import estimates
from engine.targets.cuda.families import traits_of
from engine.targets.cuda.kernel import Context, WeightStore
from tests.benchmarks.test_conv_cases import graph_of

CONTEXT = Context(SM_90A, 132, WeightStore())


def blocks_of(graph: Graph) -> set[BlockCase]:
    """Its inverted residuals at batch 1."""
    found = set[BlockCase]()
    for node in passes.run(graph, replace(traits_of(SM_90A), storage_type=DType.F16)).nodes:
        if isinstance(node.op, ops.ConvBlock):
            (expanded, channels, *_), filters, (outputs, *_) = (x.shape for x in node.inputs[1:4])
            stride = node.op.depthwise.strides[0]
            sizes = (channels, expanded, outputs, node.inputs[0].shape[2], filters[2], stride)
            found.add(BlockCase(1, *map(int, sizes)))  # type: ignore[arg-type]  # no symbols beside the batch
    return found


def test_every_inverted_residual_that_the_passes_find_is_listed_and_no_other(efficientnet_lite0: Path) -> None:
    lite0 = frontend.read((efficientnet_lite0 / "1" / "model.onnx").read_bytes())
    found = blocks_of(graph_of("mobilenet_v2")) | blocks_of(lite0)
    assert found == {replace(case, batch=1) for case in CASES}
    for case in found:
        assert any(estimates(step_of(case, zeros), CONTEXT)), f"{case.name} has no tile"


def test_every_block_is_listed_once_at_every_batch() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.name for case in CASES} == {replace(case, batch=n).name for case in CASES for n in BATCHES}
