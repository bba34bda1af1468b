"""Attention on sm_90a (attention_wgmma.cuh): operands through the copy engine, products on whole warpgroups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda.attention_operands import Attended, BiasKind, four, strides
from engine.targets.cuda.gemm import wgmma_function
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    Instruction,
    Launch,
    Pointer,
    TensorMap,
    ceildiv,
    launch,
    pointer_to,
)
from engine.targets.cuda.spaces import VECTOR

_MAX_WIDTH = 256  # features of a head
_BAND = 32  # heads whose causal tiles are dealt from the longest to the shortest; their k and v stay in L2
_MASK_TILES = 32  # tiles of keys, up to which those that a padding mask hides are left out: a bit each
_ROUNDS = 8  # items a block, up to which the cost model deals them one by one
_BINS = 32  # of lengths, 4 bytes each, that packed sequences are sorted into
MAX_SEQUENCES = 1023  # packed ones whose order fits beside the tiles
_MIN_QUERIES = 17  # up to 16 the portable kernel wastes fewer rows, and deals the keys to several blocks


@dataclass(frozen=True)
class WgmmaAttentionTile:
    """A block: `consumers` warpgroups of 64 queries and one that fills rings of `stages` tiles of `keys` keys and of
    `q_stages` of queries. `blocks` blocks share a multiprocessor; registers are those of a thread. `turns`: consumers
    take turns to start products."""

    consumers: int
    keys: int
    stages: int
    blocks: int
    producer_registers: int
    consumer_registers: int
    turns: bool = True
    q_stages: int = 2

    @property
    def queries(self) -> int:
        return 64 * self.consumers

    def shared_bytes(self, work: Work) -> int:
        """Tiles of q, rings of k and v, the biases beside k, items, the order of packed sequences, and the barriers
        (attention_wgmma.cuh). With a bias by key and packed an item passes through one more place."""
        head, packed = _padded(work.head, 32), work.places > 0
        tiles = self.q_stages * self.queries * head * 2 + self.stages * self.keys * (head + work.value) * 2
        biases = {
            BiasKind.NONE: 0, BiasKind.PER_KEY: self.keys * 4,
            BiasKind.FULL: self.queries * self.keys * work.bias_itemsize,
        }[work.bias]  # fmt: skip
        items = self.q_stages + (packed or work.bias is BiasKind.PER_KEY)
        order = 8 * (work.places + _BINS // 2) if packed else 0
        barriers = 2 * items + (5 if packed else 4) * self.stages
        return tiles + self.stages * biases + 32 * items + order + 8 * barriers


def suits(step: Step) -> bool:
    """Whether the copy engine can read q, k, v and a full bias, and the kernel has what the operator asks."""
    attended = Attended(step)
    return (
        step.inputs[0].dtype in (DType.F16, DType.BF16)
        and attended.op.scale > 0  # it meets the scores behind the maximum
        and (attended.op.packed or attended.sizes[2] >= _MIN_QUERIES)
        and attended.sequences <= MAX_SEQUENCES
        and all(_readable(tensor) for tensor in step.inputs[:3])
        and (attended.bias is not BiasKind.FULL or _readable_bias(attended))
    )


def _readable_bias(attended: Attended) -> bool:
    """Keys are neighbours, and start and strides whole chunks of 16 bytes."""
    bias, chunk = attended.step.inputs[3], 16 // attended.step.inputs[3].dtype.itemsize
    *outer, inner = attended.bias_strides
    return inner == 1 and bias.offset % chunk == 0 and all(stride >= 0 and stride % chunk == 0 for stride in outer)


def _readable(tensor: Tensor) -> bool:
    """Starts and strides are whole, positive chunks of 16 bytes, and no axis is empty."""
    *outer, _ = zip(tensor.shape, tensor.strides, strict=True)
    return (
        0 < tensor.shape[-1] <= _MAX_WIDTH
        and tensor.offset % VECTOR == 0
        and all(size == 1 or (size > 0 and stride > 0 and stride % VECTOR == 0) for size, stride in outer)
    )


def candidates(work: Work) -> list[WgmmaAttentionTile]:
    """Tiles whose kernels have no spills, and fit the shared memory of a multiprocessor. A block starts with as many
    registers a thread as its launch bounds allow; producer and consumers divide those anew."""
    tiles = _with_full_bias(work) if work.bias is BiasKind.FULL else _without_full_bias(work)
    return [tile for tile in tiles if tile.shared_bytes(work) <= _shared_limit(tile.blocks)]


def _shared_limit(blocks: int) -> int:
    """Of each of the blocks that share a multiprocessor's 228 KiB, beside the KiB that the system takes."""
    return (228 << 10) // blocks - (1 << 10)


def _without_full_bias(work: Work) -> Iterator[WgmmaAttentionTile]:
    widest = max(work.head, work.value)
    if widest <= 64:
        yield WgmmaAttentionTile(3, 128, 2, 1, 32, 160)
        yield WgmmaAttentionTile(4, 64, 8, 1, 32, 112)
        yield WgmmaAttentionTile(2, 128, 4, 1, 40, 232)
        yield WgmmaAttentionTile(1, 128, 2, 2, 40, 208, turns=False)
    elif widest <= 128:
        if widest <= 96:
            yield WgmmaAttentionTile(3, 96, 3, 1, 32, 160)
        yield WgmmaAttentionTile(2, 128, 2, 1, 40, 232)
        yield WgmmaAttentionTile(1, 64, 2, 2, 40, 208, turns=False)
    elif widest <= 192:
        yield WgmmaAttentionTile(2, 96, 2, 1, 40, 232, q_stages=1)
        yield WgmmaAttentionTile(1, 32, 2, 2, 40, 208, turns=False, q_stages=1)
    else:
        # Lanes of a warp bring biases, 32 keys at a time.
        yield WgmmaAttentionTile(2, 80 if work.bias is BiasKind.NONE else 64, 2, 1, 40, 232, q_stages=1)
        yield WgmmaAttentionTile(1, 64, 2, 1, 40, 232, turns=False, q_stages=1)


def _with_full_bias(work: Work) -> Iterator[WgmmaAttentionTile]:
    """A tile of biases is as large as one of k and v, in fp32 twice as large."""
    widest = max(work.head, work.value)
    if widest <= 128:
        if widest <= 96:
            yield WgmmaAttentionTile(3, 128 if widest <= 64 else 96, 2, 1, 32, 160)
            yield WgmmaAttentionTile(3, 64, 2, 1, 32, 160)
        yield WgmmaAttentionTile(2, 128, 2, 1, 40, 232, q_stages=1 if widest > 96 else 2)
        yield WgmmaAttentionTile(2, 64, 2, 1, 40, 232)
        yield WgmmaAttentionTile(1, 64, 2, 2, 40, 208, turns=False, q_stages=1)
    elif widest <= 192:
        yield WgmmaAttentionTile(2, 64, 2, 1, 40, 232, q_stages=1)
        yield WgmmaAttentionTile(1, 32, 2, 2, 40, 208, turns=False, q_stages=1)
    else:
        yield WgmmaAttentionTile(2, 64, 2, 1, 40, 232, q_stages=1)
        yield WgmmaAttentionTile(1, 64, 2, 1, 40, 232, turns=False, q_stages=1)


def _places(sequences: int) -> int:
    """Room for the order of so many packed sequences and what lies behind them; few sizes, that kernels are few."""
    return max(32, 1 << sequences.bit_length())


def _padded(features: int, multiple: int) -> int:
    return ceildiv(features, multiple) * multiple


def depth(tensor: Tensor) -> int:
    """Features of q or k that the instruction sums over, 16 at a time; beyond 128 whole panels. The copy engine
    supplies zeros beyond a head's own."""
    features = tensor.shape[-1]
    return _padded(features, 16 if features <= 128 else 32)


def width(tensor: Tensor) -> int:
    """Features of v that a block computes: four blocks of eight at a time go to the epilogue."""
    return _padded(tensor.shape[-1], 32)


def pick(step: Step, context: Context) -> WgmmaAttentionTile:
    """The tile with the least estimated time."""
    work = work_of(step)
    return min(candidates(work), key=lambda tile: cycles(tile, work, context.multiprocessors))


def work_of(step: Step) -> Work:
    """What there is to do in an attention step."""
    attended = Attended(step)
    batch, heads, queries, _ = attended.sizes
    keys, groups, places = attended.keys, batch * heads, 0
    if attended.op.packed:
        # How long sequences are only the device knows: they count as equally long.
        queries = keys = max(1, ceildiv(queries, max(1, attended.sequences)))
        groups, places = max(1, attended.sequences) * heads, _places(attended.sequences)
    full = attended.bias is BiasKind.FULL
    return Work(
        queries, keys, groups, depth(step.inputs[0]), width(step.inputs[2]), attended.op.causal, attended.bias,
        step.inputs[3].dtype.itemsize if full else 0, step.inputs[3].elements if full else 0, places,
    )  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What there is to do: `groups` products of batch and heads. `head` and `value` are padded. `bias_itemsize`,
    `biases`: bytes and number of the elements of a full bias; `places`: room for the order of packed sequences."""

    queries: int
    keys: int
    groups: int
    head: int
    value: int
    causal: bool
    bias: BiasKind = BiasKind.NONE
    bias_itemsize: int = 0
    biases: int = 0
    places: int = 0


def cycles(tile: WgmmaAttentionTile, work: Work, multiprocessors: int) -> float:
    """Estimated cycles, at about 1.7 GHz. The constants are fitted to a sweep on an H100 (fp16, heads of 64 and 128,
    128 to 16384 tokens, one to four consumers): 3 % root mean square, 10 % at most."""
    launch, l2_bytes, memory_bytes = 4250, 37, 13  # bytes a cycle and multiprocessor
    items = ceildiv(work.queries, tile.queries) * work.groups
    blocks = min(tile.blocks, ceildiv(items, multiprocessors))  # on a multiprocessor
    # Of 64 queries and a tile of keys: multiply-adds at the full rate, 16 exponentials a cycle. A product with few keys
    # takes as long as its operands come from shared memory: 2 KiB of q and 32 bytes of each key, 128 a cycle.
    scores = work.head / 16 * max(tile.keys / 2, 16 + tile.keys / 4)
    products, exponentials = scores + 64 * tile.keys * work.value / 2048, 64 * tile.keys / 16
    busy = 50 + products + 0.55 * exponentials  # of a warpgroup's tile when others fill its gaps
    alone = 300 + products / 2 + 1.85 * exponentials
    if work.bias is BiasKind.FULL:  # a load, two conversions and two sums of a pair, 128 lanes a cycle (not measured)
        busy, alone = busy + 64 * tile.keys * 2.5 / 128, alone + 64 * tile.keys * 2.5 / 128
    feed = blocks * tile.keys * ((work.head + work.value) * 2 + tile.queries * work.bias_itemsize) / l2_bytes

    def step(active: int) -> float:
        """A tile of keys for so many warpgroups."""
        exposed = max(0.0, (alone - busy) * (3 - active) / 2)
        return max(active * busy + exposed, feed)

    ends = alone + blocks * tile.queries * (work.head + work.value) * 2 / 32

    def item(query0: int) -> float:
        """A tile of queries: its warpgroups start together on the last tile that each of them sees."""
        rows = range(query0, min(work.queries, query0 + tile.queries), 64)
        seen = [ceildiv(min(work.keys, row + 64) if work.causal else work.keys, tile.keys) for row in rows]
        tiles = range(max(seen))
        return ends + sum(step(blocks * sum(count > i for count in seen)) for i in tiles)

    lengths = [item(i * tile.queries) for i in reversed(range(ceildiv(work.queries, tile.queries)))]
    slots = multiprocessors * blocks
    # What memory takes for q, k, v, a full bias and the result where nothing lies in a cache.
    moved = work.groups * (work.queries + work.keys) * (work.head + work.value) * 2 + work.biases * work.bias_itemsize
    floor = moved / (multiprocessors * memory_bytes)
    if items > _ROUNDS * slots:
        return launch + max(floor, sum(lengths) * work.groups / slots + max(lengths) / 2)
    band = _BAND if work.causal else 1
    free = [0.0] * slots
    for first in range(0, work.groups, band):
        for length in lengths:
            for _ in range(min(band, work.groups - first)):
                heapreplace(free, free[0] + length)
    return launch + max(floor, *free)


def launch_attention(step: Step, tile: WgmmaAttentionTile, context: Context) -> Launch:
    """The launch of an attention that `suits`, in the given tile."""
    attended, (q, k, v) = Attended(step), step.inputs[:3]
    op, (batch, heads, queries, _) = attended.op, attended.sizes
    work = work_of(step)
    head, value, shared = work.head, work.value, tile.shared_bytes(work)
    # Of packed sequences at most: a tile of each is short, and of what belongs to none.
    items = (ceildiv(queries, tile.queries) + attended.sequences) * heads * batch
    blocks = min(items, context.multiprocessors * tile.blocks)
    dynamic = items > blocks
    key_tiles = ceildiv(k.shape[-2], tile.keys)
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[q.dtype], "head_padded": head, "value_padded": value, "keys": tile.keys,
        "consumers": tile.consumers, "stages": tile.stages, "causal": op.causal, "bias": attended.bias,
        "bias_type": STORAGE[step.inputs[3].dtype] if op.has_bias else "float",
        "masked_rows_zero": op.masked_rows_zero, "producer_registers": tile.producer_registers,
        "consumer_registers": tile.consumer_registers, "blocks": tile.blocks, "shared_bytes": shared,
        "q_stages": tile.q_stages, "turns": tile.turns, "band": _BAND, "dynamic": dynamic, "packed": op.packed,
        "places": work.places,
        "skips": attended.bias is BiasKind.PER_KEY and not op.causal and 1 < key_tiles <= _MASK_TILES,
    }  # fmt: skip
    arguments: dict[str, Argument] = {
        "map_q": _map(q, tile.queries, head), "map_k": _map(k, tile.keys, head), "map_v": _map(v, tile.keys, value),
        **attended.arguments(), "groups": batch * heads,
        # 0 where all of the batch read the same.
        "q_batches": int(q.shape[0] > 1), "k_batches": int(k.shape[0] > 1), "v_batches": int(v.shape[0] > 1),
    }  # fmt: skip
    arguments |= {"bias_heads": 0, "bias_batches": 0}
    full = attended.bias is BiasKind.FULL
    if full:
        arguments |= _bias_arguments(attended, tile)
    if dynamic:
        arguments["counters"] = Pointer(Buffer("taken items", BufferKind.PLAN, 8, np.zeros(2, np.uint32)), ctype="u32")
    full_bias = _FULL_BIAS.format("map_bias" if full else "map_k")
    products = wgmma_function(tile.keys, q.dtype) + register_product(value, q.dtype)
    return launch(
        "attention", "attention_wgmma.cuh", config, [attended.epilogue()], arguments,
        (blocks, 1, 1), 128 * (tile.consumers + 1), shared,
        Instruction.WGMMA, helpers="".join(
            ('#include "ptx/wgmma_panels.cuh"\n', products, attended.bias_code(), full_bias,
             attended.sequences_code())
        ),
    )  # fmt: skip


_FULL_BIAS = """struct FullBias {{
  DEVICE static const TensorMap& map(const Params& p) {{ return p.{}; }}
}};
"""
"""What the kernel reads a full bias through; without one it is not called."""


def _bias_arguments(attended: Attended, tile: WgmmaAttentionTile) -> dict[str, Argument]:
    """Boxes of a tile's queries and a panel of its keys, of one head of one of the batch; along what the bias is the
    same for, there is one place."""
    bias, (batch, heads, queries, _) = attended.step.inputs[3], attended.sizes
    itemsize = bias.dtype.itemsize
    panel = (64 if tile.keys * itemsize % 128 else 128) // itemsize
    batch_stride, head_stride, row_stride, _ = attended.bias_strides
    outer = tuple(
        (size, stride) if stride else (1, 16) for size, stride in ((heads, head_stride), (batch, batch_stride))
    )
    return {
        "map_bias": TensorMap(
            pointer_to(bias), queries, attended.keys, row_stride, tile.queries, panel, outer, exact=True
        ),
        "bias_heads": int(head_stride > 0), "bias_batches": int(batch_stride > 0),
    }  # fmt: skip


def _map(tensor: Tensor, rows: int, padded: int) -> TensorMap:
    """Boxes of `rows` positions and a panel of the `padded` features, of one head of one of the batch."""
    batch, heads, positions, features = four(tensor.shape, 1)
    # Of an axis of one place nothing depends on the stride.
    batch_stride, head_stride, row_stride, _ = (stride or VECTOR for stride in strides(tensor))
    panel = 32 if _padded(padded, 32) % 64 else 64
    outer = ((heads, head_stride), (batch, batch_stride))
    return TensorMap(pointer_to(tensor), positions, features, row_stride, rows, panel, outer)


def register_product(n: int, dtype: DType) -> str:
    """`wgmma<n, T>` with A in registers: d (64 × n, fp32) = a (64 × 16) · b, plus d itself where `accumulate` is not 0.
    b is a descriptor of a tile whose rows are k."""
    count, storage = n // 2, STORAGE[dtype]
    registers = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    parameters = "(float (&d)[{}], const u32 (&a)[4], u64 b, u32 accumulate)"
    return (
        f"template <int N, class T> DEVICE void wgmma{parameters.format('N / 2')};\n"
        f"template <> DEVICE void wgmma<{n}, {storage}>{parameters.format(count)} {{\n"
        f'  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"\n'
        f'               "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype.value}.{dtype.value} {{{registers}}}, '
        f'{{{a}}}, %{count + 4}, p, 1, 1, 1;\\n}}"\n'
        f'               : {operands} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));\n}}\n'
    )
