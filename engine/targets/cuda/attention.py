"""Attention in one kernel: the scores never reach memory. Picks between the portable kernel (attention_mma.cuh) and, on
sm_90a, TMA and wgmma: for many queries (attention_wgmma.py), for packed sequences of about a tile
(attention_short.py), and for few queries over many keys (attention_decode.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.ops import Attention, Op
from engine.plan.plan import Access, Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda import (
    attention_decode,
    attention_decode_tiles,
    attention_short,
    attention_tiles,
    attention_wgmma,
    attention_wgmma_tiles,
)
from engine.targets.cuda.attention_decode_tiles import DecodeTile
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
    if context.architecture.wgmma:
        decoding = decoding_of(step, context)
        if decoding is not None:
            return attention_decode.launch_attention(step, decoding.tile, decoding.splits)
        if short_is_faster(step, context):
            return [attention_short.launch_attention(step, attention_short.pick(step), context)]
        if attention_wgmma.suits(step):
            return [attention_wgmma.launch_attention(step, attention_wgmma.pick(step, context), context)]
    if Attended(step).op.packed:
        raise UnsupportedOp(
            "Attention on packed sequences: only sm_90a has a kernel, of f16 and bf16, for up to "
            f"{attention_wgmma.MAX_SEQUENCES} sequences and heads of a multiple of 8 up to 256"
        )
    heads, sizes = heads_of(step, context), sizes_of(step)
    portable, splits = pick(heads, sizes, context.architecture, context.multiprocessors)
    return launch_attention(step, heads, portable, splits)


def short_is_faster(step: Step, context: Context) -> bool:
    """Whether attention_short.cuh runs a step: by its model it should take less time than attention_wgmma.cuh."""
    if not attention_short.suits(step):
        return False
    work, count = attention_wgmma.work_of(step), context.multiprocessors
    other = attention_wgmma_tiles.cycles(attention_wgmma.pick(step, context), work, count)
    return attention_short.cycles(work, count) < other


@dataclass(frozen=True)
class ChosenDecoding:
    """How attention_decode.cuh runs a step, and its estimated cycles beside a launch."""

    tile: DecodeTile
    splits: int
    cycles: float


def decoding_of(step: Step, context: Context) -> ChosenDecoding | None:
    """How attention_decode.cuh runs a step; None where another kernel should be faster, or it cannot."""
    if not attention_decode.suits(step):
        return None
    work = attention_decode.work_of(step)
    tile = attention_decode_tiles.tile_of(work)
    splits = attention_decode_tiles.pick_splits(tile, work, context.multiprocessors)
    cycles = attention_decode_tiles.cycles(tile, splits, work, context.multiprocessors)
    if attention_wgmma.suits(step):
        # Undivided, and with a head a tile, it would do the same with less under way.
        if splits == 1 and attention_decode.heads_together(step) == 1:
            return None
        other, known = attention_wgmma.pick(step, context), attention_wgmma.work_of(step)
        without = attention_wgmma_tiles.cycles(other, known, context.multiprocessors) - attention_wgmma_tiles.LAUNCH
        limit = 0.9 * without  # of two models one is not fitted yet
    else:
        limit = 1.1 * _portable_cycles(step, context)  # where both wait for memory, the copy engine has more under way
    return ChosenDecoding(tile, splits, cycles) if cycles < limit else None


def _portable_cycles(step: Step, context: Context) -> float:
    """What attention_mma.cuh takes for few queries, beside a launch."""
    heads, sizes = heads_of(step, context), sizes_of(step)
    tile, splits = pick(heads, sizes, context.architecture, context.multiprocessors)
    cycles = attention_tiles.cycles(tile, splits, heads, sizes, context.architecture, context.multiprocessors)
    # Its model leaves out that one warp reads the parts one after the other, twice.
    cycles += 1000 * splits if splits > 1 else 0
    read = sum(tensor.elements * tensor.dtype.itemsize for tensor in step.inputs[1:3])
    return max(cycles - attention_tiles.LAUNCH, read / (context.multiprocessors * attention_wgmma_tiles.MEMORY_BYTES))


def heads_of(step: Step, context: Context) -> Heads:
    q, v = step.inputs[0], step.inputs[2]
    exact = q.dtype is DType.F32 and not context.tf32
    return Heads(q.shape[-1], v.shape[-1], q.dtype.itemsize, exact)


def sizes_of(step: Step) -> Sizes:
    attended = Attended(step)
    batch, heads, queries, _ = attended.sizes
    keys, window = attended.keys, attended.op.window
    if window is not None:  # as a causal mask it hides keys of some queries in a tile
        keys = min(keys, queries + window if attended.op.causal else queries + 2 * window, 64 + 2 * window)
    masked = attended.op.causal or window is not None
    return Sizes(queries, keys, batch * heads, masked, attended.bias is BiasKind.FULL)


def launch_attention(step: Step, sizes: Heads, tile: AttentionTile, splits: int = 1) -> list[Launch]:
    """The launch of an attention in the given tile, with the keys dealt to `splits` blocks."""
    attended = Attended(step)
    op, (batch, heads, queries, _) = attended.op, attended.sizes
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[step.inputs[0].dtype], "exact": sizes.exact, "warps": tile.warps,
        "fragments": tile.fragments, "keys": tile.keys, "head_padded": sizes.head_padded,
        "value_padded": sizes.value_padded, "causal": op.causal,
        "bias": attended.bias, "masked_rows_zero": op.masked_rows_zero, "access": _access(step.inputs[:3]),
        "window": op.window is not None, "ring": tile.ring, "q_in_registers": tile.q_in_registers, "split": splits > 1,
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
            tile.shared_bytes(sizes), Instruction.MMA, attended.bias_code() + attended.window_code(),
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
