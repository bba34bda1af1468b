"""Attention in one kernel (attention_mma.cuh): the scores never reach memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import e, log2

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Attention, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.attention_tiles import MAX_HEAD, AttentionTile, Heads, Sizes, pick
from engine.targets.cuda.gemm import split_arguments
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    Functor,
    I64s,
    Instruction,
    Launch,
    ceildiv,
    launch,
    pointer_to,
)
from engine.targets.cuda.spaces import operand, operands, space

_FLOATS = frozenset({DType.F16, DType.BF16, DType.F32})
_LOG2_E = log2(e)


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """q, k and v with contiguous features, other strides free; bias and results in any layout."""
    assert isinstance(op, Attention)
    types = [tensor.dtype for tensor in inputs[:3]]
    if len(set(types)) > 1 or types[0] not in _FLOATS:
        names = ", ".join(dtype.value for dtype in types)
        raise UnsupportedOp(f"Attention of {names}: the CUDA kernels take f16, bf16 or f32, the same for q, k and v")
    if inputs[0].shape[-1] > MAX_HEAD:
        head = inputs[0].shape[-1]
        raise UnsupportedOp(f"Attention with {head} features of q and k a head: the CUDA kernels take up to {MAX_HEAD}")
    if op.has_bias and inputs[3].dtype not in _FLOATS:
        raise UnsupportedOp(f"Attention with a bias of {inputs[3].dtype.value}: the CUDA kernels take f16, bf16, f32")
    inner, free = Requirement(Access.INNER, tuple(range(len(inputs[0].shape)))), Requirement()
    return (inner, inner, inner, *(free for _ in inputs[3:])), tuple(free for _ in op.stores)


def lower(step: Step, context: Context) -> list[Launch]:
    if not step.outputs[0].elements:
        return []
    heads, sizes = heads_of(step, context), sizes_of(step)
    tile, splits = pick(heads, sizes, context.architecture, context.multiprocessors)
    return launch_attention(step, heads, tile, splits)


def heads_of(step: Step, context: Context) -> Heads:
    q, v = step.inputs[0], step.inputs[2]
    exact = q.dtype is DType.F32 and not context.tf32
    return Heads(q.shape[-1], v.shape[-1], q.dtype.itemsize, exact)


def sizes_of(step: Step) -> Sizes:
    assert isinstance(step.op, Attention)
    batch, heads, queries, _ = _four(step.outputs[0].shape, 1)
    return Sizes(queries, step.inputs[1].shape[-2], batch * heads, step.op.causal)


def launch_attention(step: Step, sizes: Heads, tile: AttentionTile, splits: int = 1) -> list[Launch]:
    """The launch of an attention in the given tile, with the keys dealt to `splits` blocks."""
    op = step.op
    assert isinstance(op, Attention)
    batch, heads, queries, _ = _four(step.outputs[0].shape, 1)
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[step.inputs[0].dtype], "exact": sizes.exact, "warps": tile.warps,
        "fragments": tile.fragments, "keys": tile.keys, "head_padded": sizes.head_padded,
        "value_padded": sizes.value_padded, "causal": op.causal,
        "bias": _bias_kind(step), "masked_rows_zero": op.masked_rows_zero, "access": _access(step.inputs[:3]),
        "ring": tile.ring, "q_in_registers": tile.q_in_registers, "split": splits > 1,
        "shared_bytes": tile.shared_bytes(sizes), "blocks": tile.blocks,
    }  # fmt: skip
    arguments: dict[str, Argument] = {"scale_log2": op.scale * _LOG2_E}
    for name, tensor in zip(("q", "k", "v"), step.inputs, strict=False):
        arguments |= {name: pointer_to(tensor), f"{name}_stride": I64s(_strides(tensor)[:-1])}
    if op.has_bias:
        arguments |= {"bias": pointer_to(step.inputs[3]), "bias_stride": I64s(_bias_strides(step))}
    arguments |= {
        "queries": queries, "keys": step.inputs[1].shape[-2], "head_size": sizes.head, "value_size": sizes.value,
        "parts": sizes.parts, "heads": heads, "heads_per_k": heads // _four(step.inputs[1].shape, 1)[1],
        "heads_per_v": heads // _four(step.inputs[2].shape, 1)[1],
    }  # fmt: skip
    tiles = ceildiv(queries, tile.queries) * sizes.parts * heads * batch
    arguments |= split_arguments(tiles, tile.state(sizes), tile.warps, splits)
    return [
        launch(
            "attention", "attention_mma.cuh", config, [_epilogue(step)], arguments,
            (tiles * splits, 1, 1), 32 * tile.warps,
            tile.shared_bytes(sizes), Instruction.MMA, _bias_code(op.has_bias),
        )
    ]  # fmt: skip


def _epilogue(step: Step) -> Functor:
    assert isinstance(step.op, Attention)
    shape, stores = step.outputs[0].shape, step.op.stores
    reads = operands(step.inputs, ex.arguments(*stores), (), len(shape))
    writes = [operand(tensor, len(shape)) for tensor in step.outputs]
    rows = space(shape, range(len(shape) - 1), (len(shape) - 1,), [*reads.values(), *writes])
    placed = dict(zip(reads, rows.operands, strict=False))
    return codegen.epilogue(stores, rows, placed, rows.operands[len(reads) :], rows.columns)


_NO_BIAS, _PER_KEY, _FULL = range(3)  # in the order of attention_mma.cuh


def _bias_kind(step: Step) -> int:
    """None, the same for all queries, or full."""
    assert isinstance(step.op, Attention)
    return _NO_BIAS if not step.op.has_bias else _PER_KEY if _bias_strides(step)[2] == 0 else _FULL


def _bias_strides(step: Step) -> tuple[int, ...]:
    return _four(operand(step.inputs[3], len(step.outputs[0].shape)).strides, 0)


def _bias_code(has_bias: bool) -> str:
    if not has_bias:
        return """struct Bias {
  DEVICE static float at(const Params&, u32, u32, u32, u32) { return 0.0f; }
};
"""
    return """struct Bias {
  DEVICE static float at(const Params& p, u32 batch, u32 head, u32 query, u32 key) {
    const i64* stride = p.bias_stride;
    return widen(p.bias[batch * stride[0] + head * stride[1] + query * stride[2] + key * stride[3]]);
  }
};
"""


def _access(tensors: Sequence[Tensor]) -> int:
    """The bytes in which all rows can be read: 16, 4 or one element."""
    sizes = [
        count * tensor.dtype.itemsize
        for tensor in tensors
        for count in (*_strides(tensor)[:-1], tensor.offset, tensor.shape[-1])
    ]
    return next(nbytes for nbytes in (16, 4, 2) if all(size % nbytes == 0 for size in sizes))


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Strides along batch, head, position and feature; 0 where an axis is broadcast or missing."""
    return _four(operand(tensor, len(tensor.shape)).strides, 0)


def _four(values: tuple[int, ...], head: int) -> tuple[int, ...]:
    """Shape or strides with a head axis."""
    return values if len(values) == 4 else (values[0], head, *values[1:])
