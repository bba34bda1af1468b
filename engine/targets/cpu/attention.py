"""Fused attention: softmax(scale · q kᵀ + bias) v over strided views, for any lengths and head sizes.

The kernels are in `codegen/flash.py` and, for packed sequences, `codegen/packed.py`; this is the host side: which
views, which blocks of queries, which arguments.
"""

from __future__ import annotations

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Attention, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.codegen.flash import OUTPUT_RANK, AttentionSpec
from engine.targets.cpu.codegen.operands import Walk
from engine.targets.cpu.codegen.packed import WINDOW, PackedAttentionSpec
from engine.targets.cpu.kernel import Context, Launch, Pointer, Slot, launch, pointer_to, table
from engine.targets.cpu.spaces import Axes, operand, read_operands


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Queries, keys and values have their features next to each other; all other strides are free."""
    assert isinstance(op, Attention)
    if any(tensor.dtype is not DType.F32 for tensor in inputs[: op.operands - op.packed]):
        raise UnsupportedOp(f"Attention on {inputs[0].dtype.value}: the CPU kernel computes float32; cast the operands")
    if op.window is not None:
        raise UnsupportedOp("Attention in a window: the CPU kernel has none; the traits keep it a bias")
    inner = Requirement(Access.INNER, tuple(range(len(inputs[0].shape))))
    free = Requirement()
    return (inner,) * 3 + (free,) * (len(inputs) - 3), (free,) * len(op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    op = step.op
    assert isinstance(op, Attention)
    output = step.outputs[0]
    if not output.elements:
        return []
    rank = len(output.shape)
    sizes = _four(output.shape, 1)
    stores, reads = read_operands(op.stores, step.inputs, (), rank)
    axes = Axes(output.shape, [*reads, *(operand(out, rank) for out in step.outputs)]).padded(1, OUTPUT_RANK - rank)
    accesses = [o.access() for o in axes.operands]
    q, k, v = step.inputs[:3]
    batch, heads, queries, value_dim = sizes
    keys, head_dim = k.shape[-2:]
    args: dict[str, Slot] = {"heads": heads, "group": heads // _four(k.shape, 1)[1], "scale": op.scale}
    for name, tensor in zip("qkv", (q, k, v), strict=True):
        args |= _slots(name, tensor, ("batch", "head", "row"))
    walk = None
    if op.has_bias:
        strides = operand(step.inputs[3], rank).strides
        args |= dict(
            zip((f"bias.{axis}" for axis in ("batch", "head", "query", "key")), _four(strides, 0), strict=True)
        )
        args["bias"] = pointer_to(step.inputs[3])
        walk = Walk.FIXED if not strides[-2] else Walk.TILED if strides[-1] == DType.F32.itemsize else Walk.STRIDED
    spec = AttentionSpec(
        context.isa, head_dim, value_dim, op.causal, op.masked_rows_zero, walk,
        tuple(accesses[: len(reads)]), tuple(accesses[len(reads) :]), stores,
    )  # fmt: skip
    for (name, _), o in zip(spec.operands(), axes.operands, strict=True):
        args |= o.slots(name)
    if op.packed:
        starts = step.inputs[3]
        args |= {"tokens": queries, "sequences": starts.shape[0] - 1, "starts": pointer_to(starts)}
        args["starts.stride"] = starts.strides[0] * starts.dtype.itemsize
        tasks = heads * -(-queries // WINDOW)
        return [launch(PackedAttentionSpec(context.isa, spec), args, tasks, spec.scratch_bytes)]
    blocks = query_blocks(queries, spec.isa.lanes, spec.max_vectors)
    args |= {"queries": queries, "keys": keys, "blocks": _table(blocks), "block_count": len(blocks)}
    return [launch(spec, args, batch * heads * len(blocks), spec.scratch_bytes)]


def query_blocks(queries: int, lanes: int, max_vectors: int) -> list[tuple[int, int]]:
    """(first query, vectors) of each block: full blocks, then those as wide as they can be without an empty vector. The
    last come first: under a causal mask they have the most keys."""
    blocks = []
    first, vectors = 0, max_vectors
    while first < queries:
        while queries - first <= (vectors - 1) * lanes:
            vectors //= 2
        blocks.append((first, vectors))
        first += vectors * lanes
    return blocks[::-1]


def _table(blocks: list[tuple[int, int]]) -> Pointer:
    return table([number for block in blocks for number in block])


def _four(values: tuple[int, ...], head: int) -> tuple[int, ...]:
    """Shape or strides with a head axis."""
    return values if len(values) == OUTPUT_RANK else (values[0], head, *values[1:])


def _slots(name: str, tensor: Tensor, axes: tuple[str, ...]) -> dict[str, Slot]:
    strides = _four(operand(tensor, len(tensor.shape)).strides, 0)
    return {name: pointer_to(tensor), **{f"{name}.{axis}": strides[i] for i, axis in enumerate(axes)}}
