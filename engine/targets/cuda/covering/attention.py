"""The covering set's attention, in every kind of tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from engine.ir.dtype import DType
from engine.ir.ops import (
    Attention,
)
from engine.plan.plan import Step
from engine.targets.cuda import attention_decode, attention_short, attention_wgmma
from engine.targets.cuda.attention import heads_of, launch_attention
from engine.targets.cuda.attention_decode_tiles import tile_of
from engine.targets.cuda.attention_tiles import Heads, candidates
from engine.targets.cuda.attention_wgmma_tiles import candidates as candidates_on_warpgroups
from engine.targets.cuda.covering.build import (
    ACC,
    F16,
    F32,
    Given,
    make_step,
    stored,
)
from engine.targets.cuda.kernel import Context, Launch


def attention(
    dtype: DType,
    head: int,
    causal: bool,
    bias: int,
    tokens: int = 100,
    bias_dtype: DType = F32,
    window: int | None = None,
) -> Step:
    """Attention without a bias (0), with one for every key (1), or for every score (2)."""
    heads: tuple[DType, tuple[int, ...]] = (dtype, (2, 4, tokens, head))
    inputs: list[Given] = [heads, heads, heads]
    inputs += [(bias_dtype, (2, 1, tokens if bias == 2 else 1, tokens))] if bias else []
    op = Attention(head**-0.5, causal, bias > 0, stores=(stored(ACC, dtype),), window=window)
    kind = f"{' causal' * causal}{' window' * (window is not None)}{' bias' * (bias > 0)}"
    return make_step(op, inputs, f"attention {dtype.value} {head}{kind}")


def packed_attention(head: int, causal: bool, sequences: int = 3, tokens: int = 200) -> Step:
    """Attention on sequences that lie one after the other."""
    heads: tuple[DType, tuple[int, ...]] = (F16, (1, 4, tokens, head))
    op = Attention(head**-0.5, causal, stores=(stored(ACC),), packed=True)
    inputs: list[Given] = [heads, heads, heads, (DType.I32, (sequences + 1,))]
    return make_step(op, inputs, f"attention packed {head}{' causal' * causal}{' single' * (sequences == 1)}")


def decoding(dtype: DType, head: int, bias: int, queries: int = 4, keys: int = 1000, causal: bool = False) -> Step:
    """Attention of few queries, two heads of which share keys, without a bias (0), with one for every key (1), or for
    every score (2)."""
    kv: tuple[DType, tuple[int, ...]] = (dtype, (2, 2, keys, head))
    inputs: list[Given] = [(dtype, (2, 4, queries, head)), kv, kv]
    inputs += [(F16, (2, 1, queries if bias == 2 else 1, keys))] if bias else []
    op = Attention(head**-0.5, causal, bias > 0, stores=(stored(ACC, dtype),))
    return make_step(op, inputs, f"decoding {dtype.value} {head}{' bias' * (bias > 0)}")


def attentions(context: Context) -> Iterator[tuple[str, Launch]]:
    """Attention in every kind of tile and operands; masks, biases, unaligned heads and splits take turns."""
    turn = 0
    for dtype, tf32 in ((F16, False), (DType.BF16, False), (F32, True), (F32, False)):
        for head in (64, 128, 256):
            shape = Heads(head, head, dtype.itemsize, dtype is F32 and not tf32)
            for tile in candidates(shape, causal=False, full_bias=False):
                # Two warps compile as one or four do, bf16 as fp16.
                if tile.warps != 2 and (dtype is not DType.BF16 or tile.warps == 4):
                    turn += 1
                    odd, splits = turn % 4 == 0, 1 if turn % 3 else 4
                    # The tile of two fragments is not for wide heads with masks or full biases.
                    causal, bias = (turn % 2 == 0, turn % 3) if tile.fragments == 1 else (False, 1)
                    step = attention(dtype, head - odd, causal, bias)
                    sizes = heads_of(step, replace(context, tf32=tf32))
                    for launch in launch_attention(step, sizes, tile, splits):
                        yield step.name, launch
    for i, (dtype, head) in enumerate(product((F16, F32), (64, 128, 256))):
        step = attention(dtype, head, i % 2 == 0, i % 3, window=70)
        sizes = heads_of(step, context)
        for tile in candidates(sizes, causal=True, full_bias=False):
            if tile.warps == 4:
                for launch in launch_attention(step, sizes, tile):
                    yield step.name, launch
    if context.architecture.wgmma:
        # Without a mask, with a causal one, and with one that may hide whole tiles of keys.
        kinds = ((False, 0), (True, 1), (False, 1))
        for head, (causal, bias) in product((32, 64, 80, 96, 128, 192, 256), kinds):
            turn += 1
            dtype = DType.BF16 if turn % 4 == 0 else F16
            step = attention(dtype, head, causal, bias, tokens=200)
            for wgmma_tile in candidates_on_warpgroups(attention_wgmma.work_of(step)):
                yield step.name, attention_wgmma.launch_attention(step, wgmma_tile, context)
        for head, dtype in ((64, F16), (64, F32), (96, DType.BF16), (128, F16), (192, F32), (256, F16)):
            step = attention(F16, head, head == 96, bias=2, tokens=200, bias_dtype=dtype)
            for wgmma_tile in candidates_on_warpgroups(attention_wgmma.work_of(step)):
                yield step.name, attention_wgmma.launch_attention(step, wgmma_tile, context)
        for head, causal in ((64, False), (64, True), (96, True), (128, False), (192, True), (256, False)):
            step = packed_attention(head, causal)
            for wgmma_tile in candidates_on_warpgroups(attention_wgmma.work_of(step)):
                yield step.name, attention_wgmma.launch_attention(step, wgmma_tile, context)
        for head, causal in ((64, False), (64, True), (32, False), (48, True), (96, True), (128, False)):
            step = packed_attention(head, causal)
            for short_tile in attention_short.candidates(step):
                yield step.name, attention_short.launch_attention(step, short_tile, context)
        # Sequences of up to a tile of 64 keys; items that are alike, a few a block, and more, and many of other kinds.
        for head, (causal, bias) in product((32, 64), kinds[:3]):
            turn += 1
            step = attention(DType.BF16 if turn % 4 == 0 else F16, head, causal, bias, tokens=64)
            smallest = candidates_on_warpgroups(attention_wgmma.work_of(step))[-1]
            yield step.name, attention_wgmma.launch_attention(step, smallest, context)
        for head, tokens, (causal, bias) in product((64, 128), (128, 600), kinds):
            step = attention(F16, head, causal, bias, tokens=tokens)
            few = replace(context, multiprocessors=1)
            for wgmma_tile in list(candidates_on_warpgroups(attention_wgmma.work_of(step)))[turn % 3 :: 3]:
                yield step.name, attention_wgmma.launch_attention(step, wgmma_tile, few)
            turn += 1
        # One sequence, of as many items as blocks and of more.
        singles = ((64, False, 200), (96, True, 200), (128, False, 20000), (192, True, 20000), (256, False, 200))
        for head, causal, tokens in singles:
            step = packed_attention(head, causal, 1, tokens)
            for wgmma_tile in list(candidates_on_warpgroups(attention_wgmma.work_of(step)))[::2]:
                yield step.name, attention_wgmma.launch_attention(step, wgmma_tile, context)
        # Windows, whose tiles are those above, in every other one.
        full = {64: F16, 128: F16, 256: F32}  # biases
        for i, (head, bias) in enumerate(product((32, 64, 80, 128, 192, 256), (0, 1, 2))):
            if bias < 2 or head in full:
                step = attention(F16, head, bias == 1, bias, 200, full.get(head, F32), window=70)
                for wgmma_tile in list(candidates_on_warpgroups(attention_wgmma.work_of(step)))[i % 2 :: 2]:
                    yield step.name, attention_wgmma.launch_attention(step, wgmma_tile, context)
        for head, bias in product((32, 64, 80, 96, 128, 192, 256), (0, 1, 2)):
            turn += 1
            splits = 4 if turn % 2 else 1
            step = decoding(DType.BF16 if turn % 4 == 0 else F16, head, bias, causal=turn % 5 == 0)
            for launch in attention_decode.launch_attention(step, tile_of(attention_decode.work_of(step)), splits):
                yield step.name, launch
