"""What a pass may know of a target: a small table of traits, filled in by whoever calls `engine.passes.run`."""

from __future__ import annotations

from dataclasses import dataclass

from engine.ir.dtype import DType


@dataclass(frozen=True)
class PackedAttention:
    """What a target's attention on packed sequences takes: `types` of q, k and v, heads of a multiple of `multiple`
    features up to `widest` (None: of any width), and up to `sequences` of them (None: any number). `by_default`: models
    run on packed tokens (`unpad`) unless the caller says otherwise."""

    types: frozenset[DType]
    multiple: int = 1
    widest: int | None = None
    sequences: int | None = None
    by_default: bool = True


@dataclass(frozen=True)
class ConvBlocks:
    """The inverted residuals that a target runs at once: depthwise filters of `least` to `most` pixels a side, strides
    up to `stride`, channels of a multiple of `multiple`, up to `channels` before and `results` behind."""

    least: int
    most: int
    stride: int
    multiple: int
    channels: int
    results: int


@dataclass(frozen=True)
class Traits:
    """The capability table of a target, as far as graph rewrites are concerned.

    `channels_last`: image kernels want the channel innermost in memory. `float_types`: the floating-point types the
    target computes and stores; tensors of other float types are carried in fp32 inside the graph. `attention_types`:
    the types for which it has a fused attention; in others scores and probabilities stay apart. `storage_type`: what
    fp32 activations and weights are kept in between operators, which compute in fp32 all the same (`narrow_floats`).
    `product_types`: types beside its floats whose products it makes itself (`multiply_quantised`); of others quantised
    tensors are made floats first. `permuted_rows`: a product writes its rows in any order of several axes as fast as
    one after the other. `windows`: its attention takes a `window`; else that stays a bias. `packed`: its attention on
    packed sequences, None where it has none. `conv_means`: its depthwise convolutions add up the pixels of their result
    for less than a pass over it costs (`fuse_means`). `conv_maxima`: its convolutions store only the maxima of windows
    of their sums (`fuse_maxima`). `conv_blocks`: the inverted residuals that it runs at once (`fuse_blocks`), None
    where it has none. `excitations`: it runs the two layers of a squeeze-and-excite block at once (`fuse_excitations`).
    `scaled_weights`: its products with weights of every image's own are as fast as others (`scale_weights`).
    `divided_rows`: its products with constant weights divide the rows of their first operand by their standard
    deviation, by factors that cost less than a pass that normalises (`divide_rows`). `gathered_norms`: a norm costs
    what it reads and writes, so that one of looked-up rows, some of them in vain, is cheaper than a norm and a lookup
    (`unpack_in_norms`).
    """

    channels_last: bool = True
    float_types: frozenset[DType] = frozenset({DType.F32, DType.F64})
    attention_types: frozenset[DType] = frozenset({DType.BF16, DType.F16, DType.F32, DType.F64})
    storage_type: DType = DType.F32
    product_types: frozenset[DType] = frozenset()
    permuted_rows: bool = False
    windows: bool = False
    packed: PackedAttention | None = None
    conv_means: bool = False
    conv_maxima: bool = False
    conv_blocks: ConvBlocks | None = None
    excitations: bool = False
    scaled_weights: bool = False
    divided_rows: bool = False
    gathered_norms: bool = False
