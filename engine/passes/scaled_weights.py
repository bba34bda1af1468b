"""The pass `scale_weights`: a 1×1 convolution of an image whose channels are scaled, for each image by its own numbers
(the gates of a squeeze-and-excite block), becomes a product with weights that are scaled for each image.

(g · x) · w = x · (g · w): where an image has many times more pixels than the layer has outputs, scaling weights moves
next to nothing, and the scaled image is neither written nor read. It comes last: to all other passes it is a
convolution, whose epilogue is complete by then.

Only gates that are known to lie in [−1, 1] move, as a sigmoid's do. Then fp16 holds the scaled weights as well as it
holds the weights: a power of two, the same for all, brings the largest weight to 2¹³, so that nothing overflows, and
what is a factor of 2²⁷ smaller is still a normal number; the epilogue takes it back, exactly.
"""

from __future__ import annotations

from functools import partial, reduce
from math import frexp, inf, prod

import numpy as np

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node, Value, constant
from engine.ir.interval import bounds
from engine.ir.ops import Conv, Gemm, Op, Pointwise, Reshape, Transpose
from engine.passes.editor import Editor
from engine.passes.operands import is_matrix_product, stores_of
from engine.passes.traits import Traits

_PIXELS_PER_OUTPUT = 8
"""Below, several tiles of weights are scaled for every tile of the image: 56 pixels a side and 24 outputs are 131, 14
a side and 80 are 2."""


def scale_weights(graph: Graph, traits: Traits) -> None:
    """Rewrite every such convolution, where the target's products with weights of each image are as fast."""
    if not traits.scaled_weights:
        return
    editor = Editor(graph)
    for node in editor.nodes():
        if not _is_layer(node) or not _all_readable(node) or editor.only_user(node.inputs[0]) is not node:
            continue
        scaling = editor.producer(node.inputs[0])
        found = None if scaling is None else _scaled(scaling)
        if scaling is None or found is None or found[1].dtype is not node.inputs[1].dtype:
            continue
        if _is_at_most_one(editor, found[0]):
            _rewrite(editor, node, *found)
            editor.remove(scaling)
    editor.finish()


def _is_layer(node: Node) -> bool:
    """Whether a node is a 1×1 convolution with constant weights and enough pixels for each of its outputs."""
    if not is_matrix_product(node) or len(node.outputs) != 1:
        return False
    weight, pixels = node.inputs[1], node.output.shape[2:]
    known = [size for size in (*pixels, *weight.shape) if isinstance(size, int)]
    if not weight.is_constant or len(known) < len(pixels) + len(weight.shape):
        return False
    return prod(known[: len(pixels)]) >= _PIXELS_PER_OUTPUT * known[len(pixels)]


def _scaled(node: Node) -> tuple[Value, Value] | None:
    """(gate, image) where a node multiplies an image by a number for each of its channels."""
    op = node.op
    if not isinstance(op, Pointwise) or op.gathers or len(op.stores) != 1:
        return None
    factors = _uncast(op.stores[0])
    if not isinstance(factors, ex.Apply) or factors.op is not ex.PointOp.MUL:
        return None
    pair = [_uncast(factor) for factor in factors.args]
    values = [node.inputs[factor.index] for factor in pair if isinstance(factor, ex.Arg)]
    if len(values) != 2 or values[0].dtype is not values[1].dtype:
        return None
    gate, image = sorted(values, key=lambda value: value.shape == node.output.shape)
    shape = node.output.shape
    return (gate, image) if gate.shape == (*shape[:2], *(1 for _ in shape[2:])) and image.shape == shape else None


def _uncast(e: ex.Expr) -> ex.Expr:
    return e.args[0] if isinstance(e, ex.Apply) and e.op is ex.PointOp.CAST else e


def _is_at_most_one(editor: Editor, gate: Value) -> bool:
    """Whether no element of a gate is larger than 1 in size, whatever it is computed from."""
    node = editor.producer(gate)
    while node is not None and isinstance(node.op, Reshape | Transpose):
        gate = node.inputs[0]
        node = editor.producer(gate)
    stores = () if node is None else stores_of(node.op)
    if node is None or len(stores) != len(node.outputs):
        return False
    low, high = bounds(stores[node.outputs.index(gate)])
    return max(-low, high) <= 1 + 2.0**-10  # a sixth of what is clipped to [0, 6] is 1 and a rounding


def _all_readable(node: Node) -> bool:
    """Whether all that the epilogue reads is as large as the result, or a constant for each channel or for all, and
    none of it the scaled image, which is not computed any more."""
    shape = node.output.shape
    per_channel = (shape[1], *(1 for _ in shape[2:]))
    constants = ((), per_channel, (1, *per_channel))
    return node.inputs[0] not in node.inputs[2:] and all(
        value.shape == shape or (value.is_constant and value.shape in constants) for value in node.inputs[2:]
    )


def _exponent(weight: Value) -> int:
    """The power of two that weights of fp16 are multiplied by."""
    assert weight.data is not None
    largest = float(np.abs(weight.data).max(initial=0))
    return 14 - frexp(largest)[1] if weight.dtype is DType.F16 and 0 < largest < inf else 0


def _rescaled(store: ex.Expr, exponent: int) -> ex.Expr:
    """The same of a sum that is 2 ** `exponent` as large."""
    acc = next((leaf for leaf in ex.walk(store) if isinstance(leaf, ex.Acc)), None)
    if acc is None or not exponent:
        return store
    return ex.replace_acc(store, ex.apply(ex.PointOp.MUL, acc, ex.const(2.0**-exponent, acc.dtype)))


def _rewrite(editor: Editor, node: Node, gate: Value, image: Value) -> None:
    """Make `node` a view of a product of the image's pixels and the scaled weights, all as [n, …, channels]."""
    conv, result, weight = node.op, node.output, node.inputs[1]
    assert isinstance(conv, Conv)
    assert weight.data is not None
    name, rank = result.name, result.rank

    def add(op: Op, *inputs: Value, suffix: str) -> Value:
        return editor.add(op, inputs, f"{name}/{suffix}", node.origin).output

    def pixels(value: Value) -> Value:
        turned = add(Transpose((0, *range(2, rank), 1)), value, suffix="channels inner")
        count = prod(size for size in value.shape[2:] if isinstance(size, int))
        return add(Reshape((value.shape[0], count, value.shape[1])), turned, suffix="pixels")

    def row(value: Value) -> Value:
        assert value.data is not None
        return constant(f"{value.name}/row", value.data.reshape(-1)) if value.shape else value

    gates = add(Reshape((gate.shape[0], 1, gate.shape[1])), gate, suffix="gates")
    plain = constant(f"{weight.name}/matrix", weight.data.reshape(weight.data.shape[:2]))
    computed = DType.F64 if weight.dtype is DType.F64 else DType.F32
    factors = [ex.cast(ex.Arg(i, value.dtype), computed) for i, value in enumerate((gates, plain))]
    exponent = _exponent(weight)
    if exponent:
        factors.append(ex.const(2.0**exponent, computed))
    scaling = Pointwise((ex.cast(reduce(partial(ex.apply, ex.PointOp.MUL), factors), weight.dtype),))
    scaled = add(scaling, gates, plain, suffix="weights")  # [n, outputs, channels]: the sum is over what lies together
    turned = add(Transpose((0, 2, 1)), scaled, suffix="channels outer")
    reads = [pixels(value) if value.shape == result.shape else row(value) for value in node.inputs[2:]]
    stores = tuple(_rescaled(store, exponent) for store in conv.stores)
    product = add(Gemm(stores), pixels(image), turned, *reads, suffix="product")
    lines = add(Reshape((result.shape[0], *result.shape[2:], result.shape[1])), product, suffix="image")
    editor.update(node, Transpose((0, rank - 1, *range(1, rank - 1))), (lines,))
