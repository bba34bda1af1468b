"""Attention in one kernel: the scores never reach memory. Picks between the portable kernel (attention_mma.cuh) and, on
sm_90a, TMA and wgmma: for many queries (attention_wgmma.py), and for few of them over many keys (attention_decode.py)."""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Attention, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import (
    attention_decode,
    attention_decode_tiles,
    attention_tiles,
    attention_wgmma,
    attention_wgmma_tiles,
)
from engine.targets.cuda.attention_operands import Attended, BiasKind, strides
from engine.targets.cuda.attention_tiles import MAX_HEAD, AttentionTile, Heads, Sizes, pick
from engine.targets.cuda.gemm_wgmma import split_arguments
from engine.targets.cuda.kernel import (
    STORAGE,
    Context,
    I64s,
    Instruction,
    Launch,
    ceildiv,
    launch,
    pointer_to,
)

_FLOATS = frozenset({DType.F16, DType.BF16, DType.F32})


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
    if context.architecture.wgmma:
        suited = attention_wgmma.suits(step)
        if attention_decode.suits(step):
            decoding = attention_decode.work_of(step)
            tile = attention_decode_tiles.tile_of(decoding)
            splits = attention_decode_tiles.pick_splits(tile, decoding, context.multiprocessors)
            estimated = attention_decode_tiles.cycles(tile, splits, decoding, context.multiprocessors)
            if estimated < _MARGIN * _cycles_without(step, suited, context):
                return [attention_decode.launch_attention(step, tile, splits, context)]
        if suited:
            return [attention_wgmma.launch_attention(step, attention_wgmma.pick(step, context), context)]
    if Attended(step).op.packed:
        raise UnsupportedOp(
            "Attention on packed sequences: only sm_90a has a kernel, of f16 and bf16, for up to "
            f"{attention_wgmma.MAX_SEQUENCES} sequences and heads of a multiple of 8 up to 256"
        )
    portable, splits = pick(heads, sizes, context.architecture, context.multiprocessors)
    return launch_attention(step, heads, portable, splits)


_MARGIN = 0.9  # of another kernel's estimated time: three models of time agree no better


def _cycles_without(step: Step, suited: bool, context: Context) -> float:
    """The estimated cycles, beside a launch, of the kernel that runs an attention where attention_decode.cuh does not.
    `suited`: attention_wgmma.cuh can."""
    multiprocessors = context.multiprocessors
    if suited:
        wgmma, work = attention_wgmma.pick(step, context), attention_wgmma.work_of(step)
        return attention_wgmma_tiles.cycles(wgmma, work, multiprocessors) - attention_wgmma_tiles.LAUNCH
    heads, sizes = heads_of(step, context), sizes_of(step)
    tile, splits = pick(heads, sizes, context.architecture, multiprocessors)
    times = attention_tiles.cycles(tile, splits, heads, sizes, context.architecture, multiprocessors)
    read = sum(tensor.elements * tensor.dtype.itemsize for tensor in step.inputs[1:3])
    return max(times - attention_tiles.LAUNCH, read / (multiprocessors * attention_wgmma_tiles.MEMORY_BYTES))


def heads_of(step: Step, context: Context) -> Heads:
    q, v = step.inputs[0], step.inputs[2]
    exact = q.dtype is DType.F32 and not context.tf32
    return Heads(q.shape[-1], v.shape[-1], q.dtype.itemsize, exact)


def sizes_of(step: Step) -> Sizes:
    attended = Attended(step)
    batch, heads, queries, _ = attended.sizes
    return Sizes(queries, attended.keys, batch * heads, attended.op.causal, attended.bias is BiasKind.FULL)


def launch_attention(step: Step, sizes: Heads, tile: AttentionTile, splits: int = 1) -> list[Launch]:
    """The launch of an attention in the given tile, with the keys dealt to `splits` blocks."""
    attended = Attended(step)
    op, (batch, heads, queries, _) = attended.op, attended.sizes
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[step.inputs[0].dtype], "exact": sizes.exact, "warps": tile.warps,
        "fragments": tile.fragments, "keys": tile.keys, "head_padded": sizes.head_padded,
        "value_padded": sizes.value_padded, "causal": op.causal,
        "bias": attended.bias, "masked_rows_zero": op.masked_rows_zero, "access": _access(step.inputs[:3]),
        "ring": tile.ring, "q_in_registers": tile.q_in_registers, "split": splits > 1,
        "shared_bytes": tile.shared_bytes(sizes), "blocks": tile.blocks,
    }  # fmt: skip
    arguments = {**attended.arguments(), "head_size": sizes.head, "parts": sizes.parts}
    for name, tensor in zip(("q", "k", "v"), step.inputs, strict=False):
        arguments |= {name: pointer_to(tensor), f"{name}_stride": I64s(strides(tensor)[:-1])}
    tiles = ceildiv(queries, tile.queries) * sizes.parts * heads * batch
    arguments |= split_arguments(tiles, tile.state(sizes), tile.warps, splits)
    return [
        launch(
            "attention", "attention_mma.cuh", config, [attended.epilogue()], arguments,
            (tiles * splits, 1, 1), 32 * tile.warps,
            tile.shared_bytes(sizes), Instruction.MMA, attended.bias_code(),
        )
    ]  # fmt: skip


def _access(tensors: Sequence[Tensor]) -> int:
    """The bytes in which all rows can be read: 16, 4 or one element."""
    sizes = [
        count * tensor.dtype.itemsize
        for tensor in tensors
        for count in (*strides(tensor)[:-1], tensor.offset, tensor.shape[-1])
    ]
    return next(nbytes for nbytes in (16, 4, 2) if all(size % nbytes == 0 for size in sizes))
