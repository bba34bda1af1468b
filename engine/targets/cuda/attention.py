"""Attention in one kernel (attention_mma.cuh): the scores never reach memory."""

from __future__ import annotations

from math import e, log2

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Attention, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import codegen
from engine.targets.cuda.kernel import (
    Argument,
    Context,
    I64s,
    Instruction,
    Launch,
    ceildiv,
    launch,
    pointer_to,
)
from engine.targets.cuda.spaces import VECTOR, operand, operands, space

_MAX_HEAD = 128  # features a head; beyond, the fragments of q and of the output outgrow the registers
_LOG2_E = log2(e)


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """q, k and v with contiguous features, other strides free; the bias in any layout."""
    assert isinstance(op, Attention)
    q, v = inputs[0], inputs[2]
    if any(tensor.dtype is not DType.F16 for tensor in inputs[:3]):
        raise UnsupportedOp(f"Attention of {q.dtype.value}: the CUDA kernels take f16 (precision='fp16')")
    for size in (q.shape[-1], v.shape[-1]):
        if size > _MAX_HEAD or size % VECTOR:
            raise UnsupportedOp(
                f"Attention with {size} features a head: the CUDA kernels take multiples of 8 up to 128"
            )
    if op.has_bias and inputs[3].dtype not in (DType.F16, DType.F32):
        raise UnsupportedOp(f"Attention with a bias of {inputs[3].dtype.value}: the CUDA kernels take f16 and f32")
    inner = Requirement(Access.INNER, tuple(range(len(q.shape))))
    return (
        (inner, inner, inner, *(Requirement() for _ in inputs[3:])),
        tuple(inner for _ in op.stores),
    )


def lower(step: Step, context: Context) -> list[Launch]:
    op = step.op
    assert isinstance(op, Attention)
    queries, shape = step.inputs[0].shape[-2], step.outputs[0].shape
    heads, kv_heads = (shape[1], step.inputs[1].shape[1]) if len(shape) == 4 else (1, 1)
    reads = operands(step.inputs, ex.arguments(*op.stores), (), len(shape))
    writes = [operand(tensor, len(shape)) for tensor in step.outputs]
    rows = space(shape, range(len(shape) - 1), (len(shape) - 1,), [*reads.values(), *writes])
    epilogue = codegen.epilogue(
        op.stores, rows, dict(zip(reads, rows.operands, strict=False)), rows.operands[len(reads) :], rows.columns
    )

    head, value = step.inputs[0].shape[-1], shape[-1]
    head_padded, value_padded = ceildiv(head, 16) * 16, ceildiv(value, 32) * 32
    narrow = max(head_padded, value_padded) <= 64
    warps = 4 if queries > 32 else 2 if queries > 16 else 1
    # Two rows of fragments halve the reads of k and v; a causal mask on wide heads leaves no registers for them.
    fragments = 2 if narrow and queries > 64 and not (op.causal and head_padded > 32) else 1
    keys = 64
    bias = _bias_strides(step, len(shape))
    shared = 16 * warps * fragments * _row_bytes(head_padded)
    shared += 2 * keys * (_row_bytes(head_padded) + _row_bytes(value_padded) + 4)
    config: dict[str, int | bool | str] = {
        "warps": warps, "fragments": fragments, "keys": keys, "head_padded": head_padded, "value_padded": value_padded,
        "causal": op.causal, "bias": _bias_kind(bias), "masked_rows_zero": op.masked_rows_zero, "shared_bytes": shared,
        # 12 warps leave each thread 168 registers, 8 all 255: what the gate shows to be free of spills.
        "blocks": 3 if warps == 4 and fragments == 1 and narrow else 8 // warps,
    }  # fmt: skip
    arguments: dict[str, Argument] = {"scale_log2": op.scale * _LOG2_E}
    for name, tensor in zip(("q", "k", "v"), step.inputs, strict=False):
        strides = _strides(tensor, len(shape))
        if any(stride % VECTOR for stride in strides[:-1]) or tensor.offset % VECTOR:
            raise UnsupportedOp(f"{step.name}: {name} starts or strides off a 16-byte boundary")
        arguments |= {name: pointer_to(tensor), f"{name}_stride": I64s(strides[:-1])}
    if bias is not None:
        arguments |= {"bias": pointer_to(step.inputs[3]), "bias_stride": I64s(bias)}
    arguments |= {
        "queries": queries, "keys": step.inputs[1].shape[-2], "head_size": head, "value_size": value,
        "heads_per_kv": heads // kv_heads,
    }  # fmt: skip
    grid = (ceildiv(queries, 16 * warps * fragments), heads, shape[0])
    return [
        launch(
            "attention", "attention_mma.cuh", config, [epilogue], arguments, grid, 32 * warps, shared, Instruction.MMA,
            _WITH_BIAS if op.has_bias else _WITHOUT_BIAS,
        )
    ]  # fmt: skip


def _bias_strides(step: Step, rank: int) -> tuple[int, int, int, int] | None:
    assert isinstance(step.op, Attention)
    return _strides(step.inputs[3], rank) if step.op.has_bias else None


def _bias_kind(strides: tuple[int, int, int, int] | None) -> int:
    """As in attention_mma.cuh: none, the same for all queries, or full."""
    return 0 if strides is None else 1 if strides[2] == 0 else 2


_WITH_BIAS = """struct Bias {
  DEVICE static float at(const Params& p, u32 batch, u32 head, u32 query, u32 key) {
    const i64* stride = p.bias_stride;
    return widen(p.bias[batch * stride[0] + head * stride[1] + query * stride[2] + key * stride[3]]);
  }
};
"""
_WITHOUT_BIAS = """struct Bias {
  DEVICE static float at(const Params&, u32, u32, u32, u32) { return 0.0f; }
};
"""


def _strides(tensor: Tensor, rank: int) -> tuple[int, int, int, int]:
    """Strides along the four axes of a tensor that broadcasts to `rank` axes; without a head axis (rank 3) that one is
    0."""
    batch, *heads, positions, last = operand(tensor, rank).strides
    return batch, heads[0] if heads else 0, positions, last


def _row_bytes(features: int) -> int:
    """Bytes of a row of a tile in shared memory: 64 or a multiple of 128."""
    return 64 if features <= 32 else ceildiv(features * 2, 128) * 128
