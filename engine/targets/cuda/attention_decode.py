"""Attention of few queries on sm_90a (attention_decode.cuh): keys and values are read once for all queries and heads
that share them, by several blocks where one a head would leave the GPU empty; attention_join.cuh then joins what these
have."""

from __future__ import annotations

from math import gcd

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.targets.cuda.attention_decode_tiles import MOST_SPLITS, ROWS, DecodeTile, Decoding
from engine.targets.cuda.attention_operands import Attended, BiasKind, strides
from engine.targets.cuda.attention_wgmma import depth, map_of, readable, register_product, width
from engine.targets.cuda.gemm_wgmma import wgmma_function
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    I64s,
    Instruction,
    Launch,
    Pointer,
    ceildiv,
    launch,
    pointer_to,
    workspace,
)

_JOINING_WARPS = 4  # of a block, a row each: few, so that rows spread over the multiprocessors


def suits(step: Step) -> bool:
    """Whether the queries of a head fit a tile, and the copy engine can read k and v."""
    attended = Attended(step)
    return (
        step.inputs[0].dtype in (DType.F16, DType.BF16)
        and attended.op.scale > 0  # it meets the scores behind the maximum
        and not attended.op.packed
        and attended.op.window is None  # nothing that few queries see is long then
        and attended.sizes[2] <= ROWS
        and step.inputs[0].shape[-1] % 8 == 0  # q is read by 16 bytes
        and all(readable(tensor) for tensor in step.inputs[:3])
    )


def heads_together(step: Step) -> int:
    """How many of the heads that share keys and values are in a tile."""
    attended = Attended(step)
    sharing = gcd(attended.heads_per(1), attended.heads_per(2))
    queries = attended.sizes[2]
    return max((n for n in range(2, sharing + 1) if sharing % n == 0 and n * queries <= ROWS), default=1)


def bias_of(step: Step) -> BiasKind:
    """What the bias of a score depends on: PER_KEY is alike for all rows of a tile."""
    attended = Attended(step)
    differs = attended.bias is BiasKind.PER_KEY and heads_together(step) > 1 and attended.bias_strides[1] != 0
    return BiasKind.FULL if differs else attended.bias


def work_of(step: Step) -> Decoding:
    """What there is to do in an attention step."""
    attended, (q, k, v) = Attended(step), step.inputs[:3]
    batch, heads, queries, _ = attended.sizes
    together = heads_together(step)
    keys = min(attended.keys, queries) if attended.op.causal else attended.keys
    return Decoding(
        tiles=batch * heads // together,
        rows=together * queries,
        keys=keys,
        shared_by=attended.heads_per(1) // together,
        head=depth(q),
        value=width(v),
        key_bytes=(k.shape[-1] + v.shape[-1]) * k.dtype.itemsize,
        bias=bias_of(step),
    )


def launch_attention(step: Step, tile: DecodeTile, splits: int) -> list[Launch]:
    """The launches of an attention that `suits`, in the given tile, with the keys divided among `splits` blocks."""
    attended, (q, k, v) = Attended(step), step.inputs[:3]
    work, together, epilogue = work_of(step), heads_together(step), attended.epilogue()
    shared = tile.shared_bytes(work)
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[q.dtype], "head_padded": work.head, "value_padded": work.value, "keys": tile.keys,
        "stages": tile.stages, "causal": attended.op.causal, "bias": work.bias,
        "masked_rows_zero": attended.op.masked_rows_zero, "split": splits > 1, "blocks": tile.blocks,
        "shared_bytes": shared,
    }  # fmt: skip
    parts = _parts(work, splits) if splits > 1 else {}
    arguments: dict[str, Argument] = {
        "map_k": map_of(k, tile.keys, work.head), "map_v": map_of(v, tile.keys, work.value),
        "q": pointer_to(q), "q_stride": I64s(strides(q)[:-1]), "head_size": q.shape[-1],
        **attended.arguments(), "together": together, "rows": work.rows, "tiles_per_key": work.shared_by,
        # 0 where all of the batch read the same.
        "k_batches": int(k.shape[0] > 1), "v_batches": int(v.shape[0] > 1), **parts,
    }  # fmt: skip
    products = wgmma_function(tile.keys, q.dtype) + register_product(work.value, q.dtype)
    decoding = launch(
        "attention", "attention_decode.cuh", config, [epilogue], arguments,
        (work.tiles * splits, 1, 1), 160, shared, Instruction.WGMMA,
        helpers="".join(('#include "ptx/wgmma_panels.cuh"\n', products, attended.bias_code())),
    )  # fmt: skip
    if splits == 1:
        return [decoding]
    all_rows = work.tiles * work.rows
    joining = launch(
        "attention", "attention_join.cuh",
        {
            "value_padded": work.value, "masked_rows_zero": attended.op.masked_rows_zero, "most_splits": MOST_SPLITS,
            "warps": _JOINING_WARPS,
        },
        [epilogue], {**parts, "rows": work.rows, "all_rows": all_rows, "value_size": v.shape[-1]},
        (ceildiv(all_rows, _JOINING_WARPS), 1, 1), 32 * _JOINING_WARPS,
    )  # fmt: skip
    return [decoding, joining]


def _parts(work: Decoding, splits: int) -> dict[str, Argument]:
    """What attention_join.cuh reads: sums and states of every row of every part."""
    rows = work.tiles * splits * work.rows
    sums, states = rows * work.value * 4, rows * 16
    room = workspace(sums + states)
    return {
        "partials": Pointer(room, ctype="float"), "states": Pointer(room, sums, ctype="float"), "splits": splits,
    }  # fmt: skip
