"""Tile shapes of attention on warpgroups (attention_wgmma.cuh) and the cost model that ranks them. Called by
`attention_wgmma.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import heapreplace

from engine.targets.cuda.attention_operands import BiasKind
from engine.targets.cuda.kernel import ceildiv

BAND = 32  # heads whose causal tiles are dealt from the longest to the shortest; their k and v stay in L2
_BINS = 32  # of lengths, 4 bytes each, that packed sequences are sorted into
LAUNCH = 4250  # cycles from a launch to the first product, and behind the last store
MEMORY_BYTES = 13  # a cycle and multiprocessor
_ORDER, _LOOKED_UP = 1430, 410  # cycles until packed sequences are in order, and for every item of a multiprocessor
_PACKED, _PLACED = 0.72, 250  # an item's beside its tiles of keys, of packed sequences: fitted to 38 cases on an H100
_FEW_KEYS = 512  # up to which, on an H100, one consumer of 128 keys took less in each of 14 cases than two blocks of 64
_THIRD = 750  # an item's, of three consumers and 64 keys: fitted to 34 cases of heads of 128 features on an H100
_MASKED = 1.3  # of three or four consumers and heads of up to 64 with a mask by key: nine cases on an H100, 1.2 to 1.3
_ROUNDS = 8  # items a block, up to which the cost model deals them one by one
_SHARES = (0.4, 0.8, 1.2, 1.6)  # lengths of packed sequences beside their mean


@dataclass(frozen=True)
class Work:
    """What there is to do: `groups` products of batch and heads. `head` and `value` are padded. `bias_itemsize`,
    `biases`: bytes and number of the elements of a full bias; `places`: room for the order of packed sequences, where
    there are several; `window`: how near a key has to lie."""

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
    window: int | None = None
    packed: bool = False

    def seen(self, first: int, last: int) -> tuple[int, int]:
        """The first key that some of the queries from `first` to `last` see, and the one behind the last."""
        begin = 0 if self.window is None else max(0, first + 1 - self.window)
        end = last + 1 if self.causal else self.keys if self.window is None else last + self.window
        return min(begin, self.keys - 1), min(end, self.keys)


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
        head, packed = ceildiv(work.head, 32) * 32, work.packed
        tiles = self.q_stages * self.queries * head * 2 + self.stages * self.keys * (head + work.value) * 2
        biases = {
            BiasKind.NONE: 0, BiasKind.PER_KEY: self.keys * 4,
            BiasKind.FULL: self.queries * self.keys * work.bias_itemsize,
        }[work.bias]  # fmt: skip
        items = self.q_stages + (packed or work.bias is BiasKind.PER_KEY)
        order = 8 * (work.places + _BINS // 2) if work.places else 0
        barriers = 2 * items + (5 if packed else 4) * self.stages
        return tiles + self.stages * biases + 32 * items + order + 8 * barriers


def candidates(work: Work) -> list[WgmmaAttentionTile]:
    """Tiles whose kernels have no spills, and fit the shared memory of a multiprocessor. A block starts with as many
    registers a thread as its launch bounds allow; producer and consumers divide those anew."""
    tiles = _with_full_bias(work) if work.bias is BiasKind.FULL else _without_full_bias(work)
    return [tile for tile in tiles if tile.shared_bytes(work) <= shared_limit(tile.blocks)]


def shared_limit(blocks: int) -> int:
    """Of each of the blocks that share a multiprocessor's 228 KiB, beside the KiB that the system takes."""
    return (228 << 10) // blocks - (1 << 10)


def _without_full_bias(work: Work) -> Iterator[WgmmaAttentionTile]:
    widest = max(work.head, work.value)
    if widest <= 64:
        yield WgmmaAttentionTile(3, 128, 2, 1, 32, 160)
        yield WgmmaAttentionTile(4, 64, 8, 1, 32, 112)
        yield WgmmaAttentionTile(2, 128, 4, 1, 40, 232)
        yield WgmmaAttentionTile(1, 128, 2, 2, 40, 208, turns=False)
        if work.places or work.keys <= 64:  # short sequences fill no larger tile
            yield WgmmaAttentionTile(1, 64, 3, 3, 32, 128, turns=False)
    elif widest <= 96:
        yield WgmmaAttentionTile(3, 96, 3, 1, 40, 152)
        yield WgmmaAttentionTile(2, 128, 3, 1, 40, 232)
        yield WgmmaAttentionTile(1, 64, 2, 2, 40, 208, turns=False)
    elif widest <= 128:
        yield WgmmaAttentionTile(2, 128, 2, 1, 40, 232)
        thirds = (WgmmaAttentionTile(3, 64, stages, 1, 32, 160) for stages in (4, 3))
        yield next(tile for tile in thirds if tile.shared_bytes(work) <= shared_limit(tile.blocks))
        if work.places or work.bias is not BiasKind.NONE or work.keys > _FEW_KEYS:
            yield WgmmaAttentionTile(1, 64, 2, 2, 40, 208, turns=False)
        else:
            yield WgmmaAttentionTile(2, 128, 3, 1, 40, 232, q_stages=1)
            yield WgmmaAttentionTile(1, 128, 2, 1, 40, 232, turns=False)
    elif widest <= 192:
        yield WgmmaAttentionTile(2, 96, 2, 1, 40, 232, q_stages=1)
        yield WgmmaAttentionTile(2, 64, 2, 1, 40, 232)
        yield WgmmaAttentionTile(1, 32, 2, 2, 40, 208, turns=False, q_stages=1)
    else:
        # Lanes of a warp bring biases, 32 keys at a time.
        yield WgmmaAttentionTile(2, 80 if work.bias is BiasKind.NONE else 64, 2, 1, 40, 232, q_stages=1)
        yield WgmmaAttentionTile(1, 64, 2, 1, 40, 232, turns=False, q_stages=1)


def _with_full_bias(work: Work) -> Iterator[WgmmaAttentionTile]:
    """A tile of biases is as large as one of k and v, in fp32 twice as large."""
    widest = max(work.head, work.value)
    if widest <= 128:
        yield WgmmaAttentionTile(2, 128, 2, 1, 40, 232, q_stages=1 if widest > 96 else 2)
        yield WgmmaAttentionTile(2, 64, 2, 1, 40, 232)
        yield WgmmaAttentionTile(1, 64, 2, 2, 40, 208, turns=False, q_stages=1)
    elif widest <= 192:
        yield WgmmaAttentionTile(2, 64, 2, 1, 40, 232, q_stages=1)
        yield WgmmaAttentionTile(1, 32, 2, 2, 40, 208, turns=False, q_stages=1)
    else:
        yield WgmmaAttentionTile(2, 64, 2, 1, 40, 232, q_stages=1)
        yield WgmmaAttentionTile(1, 64, 2, 1, 40, 232, turns=False, q_stages=1)


def cycles(tile: WgmmaAttentionTile, work: Work, multiprocessors: int) -> float:
    """Estimated cycles, at about 1.7 GHz. The constants are fitted to a sweep on an H100 (fp16, heads of 64 and 128,
    128 to 16384 tokens, one to four consumers): 3 % root mean square, 10 % at most. Those of the exponentials were
    lowered later, by what leaving out the maxima of scores gained in nine cases in two or three tiles each. Finding the
    places of results once took 10 to 30 % off short items: of packed sequences that is fitted anew (9 % root mean
    square over 38 cases), of others the order of tiles is as it was, and the estimates are that much too long."""
    kinds = as_long(work) if work.places else [work]
    items = sum(ceildiv(kind.queries, tile.queries) * kind.groups for kind in kinds)
    blocks = min(tile.blocks, ceildiv(items, multiprocessors))  # on a multiprocessor
    slots = multiprocessors * blocks
    # What memory takes for q, k, v, a full bias and the result where nothing lies in a cache.
    moved = work.groups * (work.queries + work.keys) * (work.head + work.value) * 2 + work.biases * work.bias_itemsize
    floor = moved / (multiprocessors * MEMORY_BYTES)
    dealt = [(_items(tile, kind, blocks), kind.groups) for kind in kinds]
    longest = max(max(lengths) for lengths, _ in dealt)
    if work.places:
        busy = sum(sum(one) * groups for one, groups in dealt) / slots + longest / 2
        return LAUNCH + _ORDER + _LOOKED_UP * items / multiprocessors + max(floor, longest, busy)
    if items > _ROUNDS * slots:
        return LAUNCH + max(floor, longest, sum(sum(one) * groups for one, groups in dealt) / slots + longest / 2)
    band = BAND if work.causal and work.window is None else 1
    free = [0.0] * slots
    for first in range(0, work.groups, band):
        for length in dealt[0][0]:
            for _ in range(min(band, work.groups - first)):
                heapreplace(free, free[0] + length)
    return LAUNCH + max(floor, *free)


def streams(tile: WgmmaAttentionTile, work: Work, multiprocessors: int) -> bool:
    """Whether blocks have many items that meet one and a half tiles of keys on average or fewer. On an H100 a third
    stage of keys in place of the second of queries took 2 % less then, and more otherwise."""
    first = range(0, work.queries, tile.queries)
    seen = (work.seen(query, min(work.queries, query + tile.queries) - 1) for query in first)
    met = sum(ceildiv(end, tile.keys) - begin // tile.keys for begin, end in seen)
    return 2 * met <= 3 * len(first) and len(first) * work.groups > _ROUNDS * multiprocessors


def as_long(work: Work) -> list[Work]:
    """Packed sequences by how long they are beside their mean, which is all that the host knows."""

    def part(share: float) -> Work:
        length = max(1, round(work.queries * share))
        return replace(work, queries=length, keys=length, groups=ceildiv(work.groups, len(_SHARES)))

    return [part(share) for share in _SHARES]


def warpgroup_cycles(head: int, value: int, keys: int, bias: BiasKind) -> tuple[float, float]:
    """The cycles that 64 queries take for a tile of keys: of a warpgroup's units when others fill its gaps, and of a
    warpgroup on its own."""
    # Multiply-adds at the full rate, 16 exponentials a cycle. A product with few keys takes as long as its operands
    # come from shared memory: 2 KiB of q and 32 bytes of each key, 128 a cycle.
    scores = head / 16 * max(keys / 2, 16 + keys / 4)
    products, exponentials = scores + 64 * keys * value / 2048, 64 * keys / 16
    # What a bias adds to a score, 128 lanes a cycle: a sum and part of a load; of a full one conversions, too. Counted
    # from the code.
    added = 64 * keys / 128 * {BiasKind.NONE: 0.0, BiasKind.PER_KEY: 1.25, BiasKind.FULL: 3.5}[bias]
    return 50 + products + 0.35 * exponentials + added, 300 + products / 2 + 1.85 * exponentials + added


def _items(tile: WgmmaAttentionTile, work: Work, blocks: int) -> list[float]:
    """The cycles of each tile of queries of a head, from the last to the first, where so many blocks share a
    multiprocessor."""
    l2_bytes = 37  # a cycle and multiprocessor
    busy, alone = warpgroup_cycles(work.head, work.value, tile.keys, work.bias)
    feed = blocks * tile.keys * ((work.head + work.value) * 2 + tile.queries * work.bias_itemsize) / l2_bytes

    def step(active: int) -> float:
        """A tile of keys for so many warpgroups."""
        exposed = max(0.0, (alone - busy) * (3 - active) / 2)
        return max(active * busy + exposed, feed)

    around = alone + blocks * tile.queries * (work.head + work.value) * 2 / 32
    if work.places:
        around = _PACKED * around - _PLACED
    elif tile.consumers == 3 and tile.keys == 64:
        around += _THIRD
    more = _MASKED if work.bias is BiasKind.PER_KEY and tile.consumers >= 3 and max(work.head, work.value) <= 64 else 1

    def item(query0: int) -> float:
        """A tile of queries: its warpgroups start together on the last tile that each of them sees."""
        rows = range(query0, min(work.queries, query0 + tile.queries), 64)
        ends = (work.seen(row, row + 63) for row in rows)
        seen = [ceildiv(end, tile.keys) - begin // tile.keys for begin, end in ends]
        return more * (around + sum(step(blocks * sum(count > i for count in seen)) for i in range(max(seen))))

    return [item(i * tile.queries) for i in reversed(range(ceildiv(work.queries, tile.queries)))]
