"""The list of convolutions holds what it says: every distinct one of the four networks as the passes leave them and as
they are written, and those that other libraries were measured with; their FLOPs and bytes are what a floor is made of.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto

from benchmarks.cases.conv import BATCHES, CASES, LAYERS, NETWORKS, ConvCase, Group, Tail
from benchmarks.models.convnets import CLASSES, CONVNETS
from benchmarks.models.layers import Layers, Map
from benchmarks.models.weights import RandomWeights
from engine import frontend, passes
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.graph import Graph, Node, Value
from engine.targets.cuda.architecture import SM_90A
from engine.targets.cuda.families import traits_of
from models.onnx_writer import GraphWriter
from models.weights import FloatArray
from tests.engine.targets.cuda.planning import cuda_traits

_ACTIVATIONS = {
    frozenset(): Tail.LINEAR,
    frozenset({PointOp.MAX}): Tail.RELU,
    frozenset({PointOp.MAX, PointOp.MIN}): Tail.RELU6,
}
_WITH_RESIDUAL = {Tail.LINEAR: Tail.RESIDUAL, Tail.RELU: Tail.RESIDUAL_RELU}
_NO_ACTIVATION = {PointOp.ADD, PointOp.MUL, PointOp.CAST}  # a shift, a scale, a residual, types


class _Constant(RandomWeights):
    """Nothing to draw, and variances that batch norms can be folded by."""

    def _drawn(self, name: str, shape: tuple[int, ...]) -> FloatArray:
        return np.full(shape, 0.5, np.float32)  # a scale of 1 would be left out


def graph_of(name: str) -> Graph:
    """A network with any weights and statistics: they decide nothing of its layers' shapes."""
    writer = GraphWriter(name)
    logits = CONVNETS[name](Layers(writer, _Constant()), Map("input", 3))
    writer.result(logits.value, "logits")
    inputs = {"input": (TensorProto.FLOAT, ("batch", 3, 224, 224))}
    return frontend.read(writer.model(inputs, {"logits": ("batch", CLASSES)}).SerializeToString())


def case_of(node: Node, tail: Tail) -> ConvCase:
    """A convolution of a graph as a case at batch 1."""
    op, (image, weights) = node.op, node.inputs[:2]
    assert isinstance(op, ops.Conv)
    channels, height, width = (int(dim) for dim in image.shape[1:])
    outputs, kernel = int(weights.shape[0]), int(weights.shape[2])
    fp32 = image.dtype is DType.F32
    case = ConvCase(1, channels, outputs, height, kernel, op.strides[0], op.groups, tail, fp32)
    assert (height, weights.shape[3], op.strides[1]) == (width, kernel, op.strides[0])
    assert op.pads == ((case.pad, case.pad),) * 2
    assert op.groups in (1, channels)
    assert node.outputs[0].shape[1:] == (outputs, case.output_size, case.output_size)
    return case


def tail_of(node: Node) -> Tail:
    (store,) = node.op.stores
    used = frozenset(part.op for part in ex.walk(store) if isinstance(part, ex.Apply)) - _NO_ACTIVATION
    residual = any(value.shape == node.outputs[0].shape for value in node.inputs[2:])
    if used == {PointOp.SIGMOID}:
        assert not residual
        assert isinstance(store, ex.Apply)
        (result,) = store.args  # under the rounding to fp16
        return Tail.SILU if isinstance(result, ex.Apply) and result.op is PointOp.MUL else Tail.SIGMOID
    tail = _ACTIVATIONS[used]
    return _WITH_RESIDUAL[tail] if residual else tail


def convolutions(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if isinstance(node.op, ops.Conv)]


def shape_of(case: ConvCase) -> ConvCase:
    """A case whatever follows and whatever the image's type."""
    return replace(case, tail=Tail.LINEAR, fp32_image=False)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_distinct_layer_of_a_network_is_listed_and_no_other(name: str) -> None:
    graph = graph_of(name)
    written = {shape_of(case_of(node, Tail.LINEAR)) for node in convolutions(graph)}
    fused = {case_of(node, tail_of(node)) for node in convolutions(passes.run(graph, cuda_traits()))}
    listed = set(NETWORKS[name])
    assert fused <= listed
    assert written <= {shape_of(case) for case in listed}
    merged = listed - fused
    assert {shape_of(case) for case in merged} <= written
    assert len(merged) == (2 if name == "resnet50" else 0), "two siblings that the passes merge"


def test_layers_with_the_pool_behind_them_are_those_that_store_maxima() -> None:
    fused = set()
    for name in NETWORKS:
        graph = passes.run(graph_of(name), replace(traits_of(SM_90A), storage_type=DType.F16))
        for node in graph.nodes:
            if isinstance(node.op, ops.ConvMax):
                sums = ops.Conv.infer(node.op.conv, node.inputs)
                values = tuple(Value("", dtype, shape) for dtype, shape in sums)
                bare = Node(node.op.conv, node.inputs, values)
                fused.add(replace(case_of(bare, Tail.RELU), pool=node.op.pool.kernel[0]))
    assert fused == {layer for layer in LAYERS if layer.group is Group.POOLED}


def test_every_layer_is_listed_once_at_every_batch() -> None:
    assert set(NETWORKS) == set(CONVNETS)
    assert {layer for each in NETWORKS.values() for layer in each} <= set(LAYERS)
    assert len({case.name for case in CASES}) == len(CASES) == len(BATCHES) * len(LAYERS)
    assert {case.name for case in CASES} == {replace(case, batch=n).name for case in LAYERS for n in (1, 32, 128)}


_MEASURED_BEFORE = (
    *(
        f"b{batch} {shape} relu"
        for batch in (1, 32, 128)
        for shape in (
            "3->64@224 7x7/2", "64->64@56 3x3/1", "128->128@28 3x3/1", "256->256@14 3x3/1", "512->512@7 3x3/1",
            "128->128@56 3x3/2", "64->256@56 1x1/1", "512->128@28 1x1/1", "256->512@56 1x1/2",
        )
    ),
    *(f"b32 {shape} 3x3/1 relu" for shape in ("64->64@224", "256->256@56", "512->512@28")),
    *(f"b128 {shape} depthwise relu" for shape in ("144->144@56 3x3/1", "240->240@28 5x5/1", "672->672@14 5x5/1")),
)  # fmt: skip


def test_what_other_libraries_were_measured_with_is_listed() -> None:
    assert set(_MEASURED_BEFORE) <= {case.name for case in CASES}


def test_groups_tell_the_kernels_apart() -> None:
    groups = {case.name.removeprefix("b1 "): case.group for case in LAYERS}
    assert groups["3->64@224 7x7/2 relu fp32 image"] is Group.STEM
    assert groups["64->64@56 3x3/1 relu"] is Group.SPATIAL
    assert groups["256->512@56 1x1/2 residual relu"] is Group.POINTWISE
    assert groups["1152->48@1 1x1/1 silu"] is Group.GATE
    assert groups["672->672@14 5x5/2 depthwise silu"] is Group.DEPTHWISE
    assert {layer.kernel for layer in LAYERS if layer.group is Group.SPATIAL} == {3}
    assert set(groups.values()) == set(Group)


FLOORS = {
    # fp16 image, weights, biases, result; 2 FLOPs a multiply-add and one each for the bias and the ReLU.
    ConvCase(2, 64, 128, 56, 3): (
        2 * (2 * 64 * 56**2 + 128 * 64 * 9 + 128 + 2 * 128 * 56**2), 2 * 128 * 56**2 * (2 * 64 * 9 + 2),
    ),
    # Of a strided 1×1 layer only the pixels that it meets; the residual once, at the result's size.
    ConvCase(2, 64, 128, 56, 1, 2, tail=Tail.RESIDUAL_RELU): (
        2 * (2 * 64 * 28**2 + 128 * 64 + 128 + 2 * 2 * 128 * 28**2), 2 * 128 * 28**2 * (2 * 64 + 3),
    ),
    # All pixels where windows meet them all; a filter of one channel per group.
    ConvCase(2, 96, 96, 112, 3, 2, 96, Tail.RELU6): (
        2 * (2 * 96 * 112**2 + 96 * 9 + 96 + 2 * 96 * 56**2), 2 * 96 * 56**2 * (2 * 9 + 3),
    ),
    # An image in fp32.
    ConvCase(2, 3, 32, 224, 3, 2, fp32_image=True): (
        4 * 2 * 3 * 224**2 + 2 * (32 * 27 + 32 + 2 * 32 * 112**2), 2 * 32 * 112**2 * (2 * 27 + 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FLOORS, ids=lambda case: case.name)
def test_a_floor_counts_what_has_to_be_moved_and_computed(case: ConvCase) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    from benchmarks.gpu.steps import step_of

    cost = step_of(case).cost
    assert (cost.bytes, cost.flops) == FLOORS[case]
