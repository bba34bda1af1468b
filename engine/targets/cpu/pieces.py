"""Large batches in pieces: a plan whose intermediates do not fit the last-level cache runs part of the batch at a time.

Image networks at a batch of eight keep some tens of megabytes alive between two layers, which then go out to memory and
back. Nothing in such a network mixes the images, so running all layers for a few images, then for the next few, does
the same work with the intermediates in the cache. Used by `target.py` when a plan is bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from engine.ir.dtype import DType
from engine.ir.ops import Conv, Gemm, Norm, Op, Pad, Pointwise, Pool, Reduce, Softmax
from engine.plan.memory import Lifetime, assign_offsets
from engine.plan.plan import Plan, Step
from engine.plan.tensor import Buffer, BufferKind, Tensor

_DEFAULT_CACHE_BYTES = 8 << 20
_SHARED = (BufferKind.CONSTANT, BufferKind.PLAN)


@dataclass(frozen=True)
class Pieces:
    """`plan` computes one of `count` equal pieces of the batch; inputs and outputs of the pieces follow each other."""

    plan: Plan
    count: int


def in_pieces(plan: Plan) -> Pieces:
    """The plan for a piece of the batch, where that keeps the intermediates in the cache, else the plan as it is."""
    budget = last_level_cache_bytes() // 2  # the other half is for the weights
    batch = _batch(plan)
    if plan.arena_bytes <= budget or batch < 2:
        return Pieces(plan, 1)
    wanted = -(-plan.arena_bytes // budget)
    count = next(count for count in range(wanted, batch + 1) if batch % count == 0) if wanted <= batch else batch
    return Pieces(_piece(plan, batch // count), count)


@cache
def last_level_cache_bytes() -> int:
    """Size of the largest cache that the first processor sees."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) << {"K": 10, "M": 20}[text[-1]])
        except (OSError, ValueError, KeyError):
            continue
    return max(sizes, default=_DEFAULT_CACHE_BYTES)


def _batch(plan: Plan) -> int:
    """The size of axis 0 of every tensor, if that axis is a batch that no step mixes; else 1."""
    tensors = [*plan.inputs.values(), *plan.outputs.values()]
    batches = {tensor.shape[0] if tensor.shape else 1 for tensor in tensors}
    if len(batches) != 1:
        return 1
    (batch,) = batches
    return batch if all(_is_separable(step, batch) for step in plan.steps) else 1


def _is_separable(step: Step, batch: int) -> bool:
    """Whether a step does the same thing to every index of axis 0 of all that it computes with."""
    tensors = [*step.inputs, *step.outputs]
    computed = [t for t in tensors if t.buffer.kind not in _SHARED]
    if any(not t.shape or t.shape[0] != batch or t.strides[0] == 0 or t.dtype is DType.STRING for t in computed):
        return False
    rank = len(step.outputs[0].shape)
    fixed = [t for t in step.inputs if t.buffer.kind in _SHARED]
    if any(len(t.shape) == rank and t.shape[0] == batch for t in fixed[_weights(step.op) :]):
        return False
    return _keeps_batch(step.op, step.inputs)


def _weights(op: Op) -> int:
    """Constant operands that do not broadcast against the result."""
    return 1 if isinstance(op, Conv | Gemm) else 0


def _keeps_batch(op: Op, inputs: Sequence[Tensor]) -> bool:
    match op:
        case Conv() | Gemm():
            second = inputs[1]
            return second.buffer.kind in _SHARED and (isinstance(op, Conv) or len(second.shape) == 2)
        case Pool():
            return True
        case Pointwise():
            return not op.gathers
        case Norm():
            return not op.gathers and 0 not in op.axes
        case Reduce():
            return 0 not in op.axes
        case Softmax():
            return op.axis != 0
        case Pad():
            return op.pads[0] == (0, 0)
    return False


def _piece(plan: Plan, size: int) -> Plan:
    """The plan for the first `size` indices of the batch, with memory of its own."""
    buffers: dict[Buffer, Buffer] = {}

    def piece(tensor: Tensor) -> Tensor:
        if tensor.buffer.kind in _SHARED:
            return tensor
        shape = (size, *tensor.shape[1:])
        if tensor.buffer.kind is not BufferKind.ARENA:
            return replace(tensor, shape=shape)
        buffer = buffers.setdefault(tensor.buffer, Buffer(tensor.buffer.name, BufferKind.ARENA, 0))
        last = sum((n - 1) * max(0, stride) for n, stride in zip(shape, tensor.strides, strict=True))
        buffer.nbytes = max(buffer.nbytes, (tensor.offset + last + 1) * tensor.dtype.itemsize)
        return replace(tensor, buffer=buffer, shape=shape)

    steps = []
    spans: dict[Buffer, tuple[int, int]] = {}
    for index, step in enumerate(plan.steps):
        inputs, outputs = tuple(map(piece, step.inputs)), tuple(map(piece, step.outputs))
        steps.append(Step(step.name, step.op, inputs, outputs, step.op.cost(inputs, outputs)))
        for tensor in (*inputs, *outputs):
            if tensor.buffer.kind is BufferKind.ARENA:
                spans[tensor.buffer] = (spans.get(tensor.buffer, (index, index))[0], index)
    arena, unshared = assign_offsets([Lifetime(buffer, first, last) for buffer, (first, last) in spans.items()])
    return replace(
        plan,
        steps=tuple(steps),
        inputs={name: piece(tensor) for name, tensor in plan.inputs.items()},
        outputs={name: piece(tensor) for name, tensor in plan.outputs.items()},
        buffers=tuple(buffers.get(buffer, buffer) for buffer in plan.buffers),
        arena_bytes=arena,
        unshared_bytes=unshared,
    )
