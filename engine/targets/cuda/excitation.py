"""The two layers of a squeeze-and-excite block in one launch (excitation.cuh)."""

from __future__ import annotations

import numpy as np

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.ops import Excitation, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.conv_geometry import channels_last
from engine.targets.cuda.gemm import epilogue_of
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    Functor,
    Launch,
    Pointer,
    ceildiv,
    is_constant,
    launch,
    pointer_to,
)
from engine.targets.cuda.spaces import VECTOR, operands, space

_THREADS = 512
_BLOCK_LOADS = 24
"""Loads of eight weights of a thread, in both layers together, from which on more blocks share an image's outputs."""
_MOST_PARTS = 4  # each computes the hidden layer for itself


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Channels side by side; constant weights in any layout."""
    assert isinstance(op, Excitation)
    x, *weights = inputs[:3]
    if not all(map(is_constant, weights)) or x.shape[1] % VECTOR or weights[1].shape[0] % VECTOR:
        raise UnsupportedOp(f"{op.name}: weights have to be constants, channels multiples of {VECTOR}")
    image = Requirement(Access.INNER, channels_last(len(x.shape)))
    return (image, *(Requirement() for _ in inputs[1:])), tuple(image for _ in op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    assert isinstance(step.op, Excitation)
    if not step.outputs[0].elements:
        return []
    x = step.inputs[0]
    pixels = Tensor(x.buffer, x.dtype, (x.shape[0], 1, x.shape[1]), (x.strides[0], 0, x.strides[1]), x.offset)
    return [launch_layers(step, pixels, 1, context)]


def launch_layers(step: Step, x: Tensor, count: int, context: Context) -> Launch:
    """The launch of a step whose x is the sum over the second axis of [images, slots, channels] over `count`. What the
    step has as its own first operand tells sizes only."""
    assert isinstance(step.op, Excitation)
    w1, w2 = step.inputs[1:3]
    (hidden, channels), outputs, rank = w1.shape[:2], w2.shape[0], len(w1.shape)
    images = 1 if x.shape[0] <= 2 * context.multiprocessors else 2
    vectors, groups = _shares(hidden, channels, outputs, ceildiv(x.shape[0], images), context)
    shares = max(1, min(_THREADS * VECTOR // channels, x.shape[1]))
    first = context.weights.packed(w1, "rows", lambda w: w.reshape(hidden, channels))
    second = context.weights.packed(w2, "columns", lambda w: np.ascontiguousarray(w.reshape(outputs, hidden).T))
    element = STORAGE[w1.dtype]
    x_image, x_slot, _ = (0 if size == 1 else stride for size, stride in zip(x.shape, x.strides, strict=True))
    partial = VECTOR * max(groups * vectors, shares * channels // VECTOR)
    floats = images * (channels + ceildiv(hidden, VECTOR) * VECTOR + partial)
    arguments: dict[str, Argument] = {
        "x": pointer_to(x), "x_image": x_image, "x_slot": x_slot, "slots": x.shape[1], "shares": shares,
        "count": float(count), "w1": Pointer(first, ctype=element), "w2": Pointer(second, ctype=element),
        "images": x.shape[0], "channels": channels, "hidden": hidden, "outputs": outputs, "vectors": vectors,
        "groups": groups,
    }  # fmt: skip
    return launch(
        "excitation",
        "excitation.cuh",
        {
            "operand": element, "x_t": STORAGE[x.dtype], "threads": _THREADS, "images": images,
            "x_vector": not (x.offset | x_image | x_slot) % VECTOR,
        },
        [_hidden(step, step.op, rank), epilogue_of(step, step.op.stores, channels_last(rank), outputs)],
        arguments,
        (ceildiv(outputs, VECTOR * vectors), ceildiv(x.shape[0], images), 1),
        _THREADS,
        4 * floats,
    )  # fmt: skip


def _hidden(step: Step, op: Excitation, rank: int) -> Functor:
    """The first layer's tail: rows are images, columns hidden units."""
    reads = operands(step.inputs, ex.arguments(op.hidden), (), rank)
    order, units = channels_last(rank), step.inputs[1].shape[0]
    sizes = (step.outputs[0].shape[0], units, *step.outputs[0].shape[2:])
    placed = space(sizes, order[:-1], order[-1:], list(reads.values()))
    return codegen.hidden(op.hidden, placed, dict(zip(reads, placed.operands, strict=True)), units)


def _shares(hidden: int, channels: int, outputs: int, images: int, context: Context) -> tuple[int, int]:
    """The vectors of outputs of a block, and the groups of threads that share the hidden units: several blocks to an
    image where weights are many and multiprocessors idle."""
    loads = hidden * (channels + outputs) / VECTOR / _THREADS
    parts = min(_MOST_PARTS, max(1, context.multiprocessors // images), max(1, int(loads * _MOST_PARTS / _BLOCK_LOADS)))
    vectors = ceildiv(outputs // VECTOR, max(parts, ceildiv(outputs // VECTOR, _THREADS)))
    return vectors, min(_THREADS // vectors, hidden)
