"""Attention on sm_90a (attention_wgmma.cuh): operands through the copy engine, products on whole warpgroups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda.architecture import SM_90A
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

    def shared_bytes(self, head: int, value: int, bias: bool, places: int = 0) -> int:
        """Tiles of q, rings of k and v, the biases beside k, items, the order of packed sequences, and the barriers
        (attention_wgmma.cuh). With a bias and packed an item passes through one more place. `head` and `value` are
        padded; `places` as `_places` has it."""
        head = _padded(head, 32)
        tiles = self.q_stages * self.queries * head * 2 + self.stages * self.keys * (head + value) * 2
        biases = self.stages * self.keys * 4 if bias else 0
        items = self.q_stages + (bias or places > 0)
        order = 8 * (places + _BINS // 2) if places else 0
        return tiles + biases + 32 * items + order + 8 * (2 * items + (5 if places else 4) * self.stages)


def suits(step: Step) -> bool:
    """Whether the copy engine can read q, k and v, and the kernel has what the operator asks."""
    attended = Attended(step)
    return (
        step.inputs[0].dtype in (DType.F16, DType.BF16)
        and attended.bias is not BiasKind.FULL
        and attended.op.scale > 0  # it meets the scores behind the maximum
        and (attended.op.packed or attended.sizes[2] >= _MIN_QUERIES)
        and attended.sequences <= MAX_SEQUENCES
        and all(_readable(tensor) for tensor in step.inputs[:3])
    )


def _readable(tensor: Tensor) -> bool:
    """Starts and strides are whole, positive chunks of 16 bytes, and no axis is empty."""
    *outer, _ = zip(tensor.shape, tensor.strides, strict=True)
    return (
        0 < tensor.shape[-1] <= _MAX_WIDTH
        and tensor.offset % VECTOR == 0
        and all(size == 1 or (size > 0 and stride > 0 and stride % VECTOR == 0) for size, stride in outer)
    )


def candidates(head: int, value: int, bias: BiasKind = BiasKind.NONE) -> Iterator[WgmmaAttentionTile]:
    """Tiles whose kernels have no spills; `head` and `value` are padded. A block starts with as many registers a thread
    as its launch bounds allow; producer and consumers divide those anew."""
    widest = max(head, value)
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
        yield WgmmaAttentionTile(2, 80 if bias is BiasKind.NONE else 64, 2, 1, 40, 232, q_stages=1)
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


def step_candidates(step: Step) -> list[WgmmaAttentionTile]:
    """The tiles for an attention that `suits`: those that fit the shared memory."""
    attended, head, value = Attended(step), depth(step.inputs[0]), width(step.inputs[2])
    places = _places(attended.sequences) if attended.op.packed else 0
    return [
        tile
        for tile in candidates(head, value, attended.bias)
        if tile.shared_bytes(head, value, attended.op.has_bias, places) <= SM_90A.shared_bytes
    ]


def pick(step: Step, context: Context) -> WgmmaAttentionTile:
    """The tile with the least estimated time."""
    work = work_of(step)
    return min(step_candidates(step), key=lambda tile: cycles(tile, work, context.multiprocessors))


def work_of(step: Step) -> Work:
    """What there is to do in an attention step."""
    attended = Attended(step)
    batch, heads, queries, _ = attended.sizes
    head, value = depth(step.inputs[0]), width(step.inputs[2])
    if attended.op.packed:
        # How long sequences are only the device knows: they count as equally long.
        sequences = max(1, attended.sequences)
        each = max(1, ceildiv(queries, sequences))
        return Work(each, each, sequences * heads, head, value, attended.op.causal)
    return Work(queries, attended.keys, batch * heads, head, value, attended.op.causal)


@dataclass(frozen=True)
class Work:
    """What there is to do: `groups` products of batch and heads. `head` and `value` are padded."""

    queries: int
    keys: int
    groups: int
    head: int
    value: int
    causal: bool


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
    feed = blocks * tile.keys * (work.head + work.value) * 2 / l2_bytes

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
    # What memory takes for q, k, v and the result where nothing lies in a cache.
    floor = work.groups * (work.queries + work.keys) * (work.head + work.value) * 2 / (multiprocessors * memory_bytes)
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
    head, value = depth(q), width(v)
    places = _places(attended.sequences) if op.packed else 0
    shared = tile.shared_bytes(head, value, op.has_bias, places)
    # Of packed sequences at most: a tile of each is short, and of what belongs to none.
    items = (ceildiv(queries, tile.queries) + attended.sequences) * heads * batch
    blocks = min(items, context.multiprocessors * tile.blocks)
    dynamic = items > blocks
    key_tiles = ceildiv(k.shape[-2], tile.keys)
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[q.dtype], "head_padded": head, "value_padded": value, "keys": tile.keys,
        "consumers": tile.consumers, "stages": tile.stages, "causal": op.causal, "bias": op.has_bias,
        "masked_rows_zero": op.masked_rows_zero, "producer_registers": tile.producer_registers,
        "consumer_registers": tile.consumer_registers, "blocks": tile.blocks, "shared_bytes": shared,
        "q_stages": tile.q_stages, "turns": tile.turns, "band": _BAND, "dynamic": dynamic, "packed": op.packed,
        "places": places,
        "skips": op.has_bias and not op.causal and 1 < key_tiles <= _MASK_TILES,
    }  # fmt: skip
    arguments: dict[str, Argument] = {
        "map_q": _map(q, tile.queries, head), "map_k": _map(k, tile.keys, head), "map_v": _map(v, tile.keys, value),
        **attended.arguments(), "groups": batch * heads,
        # 0 where all of the batch read the same.
        "q_batches": int(q.shape[0] > 1), "k_batches": int(k.shape[0] > 1), "v_batches": int(v.shape[0] > 1),
    }  # fmt: skip
    if dynamic:
        arguments["counters"] = Pointer(Buffer("taken items", BufferKind.PLAN, 8, np.zeros(2, np.uint32)), ctype="u32")
    products = wgmma_function(tile.keys, q.dtype) + register_product(value, q.dtype)
    return launch(
        "attention", "attention_wgmma.cuh", config, [attended.epilogue()], arguments,
        (blocks, 1, 1), 128 * (tile.consumers + 1), shared,
        Instruction.WGMMA, helpers="".join(
            ('#include "ptx/wgmma_panels.cuh"\n', products, attended.bias_code(), attended.sequences_code())
        ),
    )  # fmt: skip


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
