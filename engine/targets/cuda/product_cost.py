"""What a product should take in each tile: the analytic cost model behind the choice of tiles. Called by `gemm.py`.

All in cycles of an H100, in terms of what the chip does: a multiprocessor multiplies a step of k while the next ones
come from the L2 cache, whichever takes longer; a block finishes its tiles, beside the next product where two consumers
take turns; before and after, memory delivers what all of them touch. The constants were fitted to timings of 637 random
products of fp16, with and without epilogues, in all tiles of two consumers (33,000 timings), of which none is in the
suites of the benchmarks. Fitted to one half of them, the tile picked for one of the other half took 5 % longer than the
best one, in the geometric mean (4 % where n and k are multiples of 64); estimates were 11 % off. Not in it: GPUs lower
their clock under products that take long (8192³ took 1,520 µs where 1,215 are estimated), and some tiles of 96 columns
take twice as long where k is long and a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from engine.targets.cuda.architecture import Architecture
from engine.targets.cuda.gemm_rows import (
    LEAST_K,
    MOST_COLUMNS,
    MOST_ROWS,
    SHORT_ROWS_TILES,
    AnyTile,
    RowsTile,
    rows_tiles,
)
from engine.targets.cuda.gemm_stream import StreamTile, stream_cycles, stream_tiles
from engine.targets.cuda.joined_tiles import JOINED_PRODUCTS, has_steps
from engine.targets.cuda.kernel import Reads, ceildiv
from engine.targets.cuda.product import Product
from engine.targets.cuda.tiles import (
    BATCHED_TILES,
    CLUSTER_TILES,
    MOST_SPLITS,
    NOTHING,
    PRODUCT_TILES,
    SHORT_TILES,
    STAGED_TILES,
    Operands,
    WgmmaTile,
    clusters_at_once,
    clusters_on,
    joining_cycles,
    mma_cycles,
    mma_tiles,
    waiting_cycles,
    wgmma_tiles,
)


class Way(Enum):
    """What a product can also run in, beside the tiles that the cost model chooses from."""

    STAGED = "results through shared memory (kernels/mma/staging.cuh)"
    SHORT = "small tiles with staged results, many of them and of one step each"
    BATCHED = "several matrices, or across the lines of b, on wgmma (kernels/mma/batch_load.cuh)"
    CLUSTER = "blocks in pairs that share an operand's tile (kernels/mma/cluster.cuh)"
    JOINED = "clusters of blocks that share the k of a tile (kernels/scheduler/joined_k.cuh)"


CHOSEN_BY_MODEL: Sequence[Way] = (Way.STAGED, Way.BATCHED, Way.JOINED)
"""The ways that are chosen by their estimates as well: of 36 products that an H100 ran in every tile, the best estimate
with these took 5 % longer than the best tile, without them 17 %. Another one is taken where the tuner has found it to
be faster."""
CLOCK_MHZ = 1755
"""The clock of all cycles here."""


_FILLED, _LONG_K = 0.95, 512
"""Where estimates of tiles of three consumers are trusted: in one round that is nearly full, of full columns, and over
a long k. Of thirteen products that they were the best for, an H100 ran the four like that 9 to 15 % faster than in the
tile that was the best before, and the others from 3 % faster to 15 % slower. 96 and 112 columns of 128 (576→96 and
672→112 at 14 × 14, batch 128) took 6 and 8 % longer than in 64 × 96 and 64 × 128."""


_SHORT_BYTES = 256
"""Of k, up to which staged tiles of 128 × 192 in turn are not taken by their estimates: 64→384@14 and 112→672@14 at
batch 128 took 10.4 and 22.1 µs in them on an H100, and 9.8 and 20.1 in the next best estimates'; 64→320@56 at batch 32
and 128 is 2 and 0.4 % slower for it."""
_MANY_ROUNDS = 40
"""Tiles of one step a multiprocessor from which small staged ones are worth timing: on an H100 the fastest where there
are 190 and 238, of two products with 48 one 1 % faster and one 11 % slower, with 18 a quarter slower."""
_STEP_WORDS = 8  # of a row that each of four lanes has of a step of wgmma


def trusts(product: Product, tile: AnyTile, multiprocessors: int) -> bool:
    """Whether a tile is taken by its estimate, without having been timed. Slices of a k that fills a step of wgmma were
    level with its tiles (64→256 at batch 128: 98.8 and 98.4 µs on an H100)."""
    if isinstance(tile, StreamTile):
        return tile.words < _STEP_WORDS
    if not isinstance(tile, WgmmaTile):
        return True
    if tile.consumers == 2:
        in_turn = tile.slots > 0 and not tile.cooperative
        return not (in_turn and tile.n == 192 and product.k * product.dtype.itemsize <= _SHORT_BYTES)
    tiles = ceildiv(product.m, tile.m) * ceildiv(product.n, tile.n) * product.batch.count
    filled = _FILLED * multiprocessors <= tiles <= multiprocessors and product.n % tile.n == 0
    return filled and product.k >= _LONG_K


@dataclass(frozen=True)
class Estimate:
    """Cycles of a product: launch and first loads, copying rows of a beforehand, the busiest multiprocessor, and memory
    from and to which all data come and go. `limit` says what a step of k waits for."""

    launch: float
    copy: float
    busy: float
    memory: float
    limit: str
    after: float = 0
    """Finding the factors of the result's rows afterwards."""

    @property
    def cycles(self) -> float:
        """Small products hide little of one behind the other, and large ones have little but products."""
        return self.launch + self.copy + self.busy + self.memory + self.after

    @property
    def us(self) -> float:
        """Microseconds."""
        return self.cycles / CLOCK_MHZ

    @property
    def bound(self) -> str:
        """What the time mostly is."""
        parts = {
            "launch": self.launch, "copied rows": self.copy, "memory": self.memory, "row factors": self.after,
            self.limit: self.busy,
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Ranked:
    """A tile, and what a product should take in it."""

    tile: AnyTile
    estimate: Estimate


_RATE = 2048  # multiply-adds of fp16 a cycle (NVIDIA's architecture paper)
_STEADY, _NARROW = 0.85, 15
"""The time of a multiplication beside that rate at our clock, which small products exceed: `steady`, and what is
divided by the columns of a tile (wide instructions read less shared memory for each)."""
_CACHE_RATE = 8450
"""Bytes a cycle from the L2 cache to all multiprocessors."""
_CUT = {32: 1.2, 16: 1.9}
"""What bytes of rows cost more that begin at multiples of so many only: 128 of them lie in two lines of the cache, or
reach into one sector more."""
_LEAST_STEP = 156  # waiting and issuing
_FINISH, _FINISH_ELEMENT = 205, 0.099
_STAGED_FINISH, _STAGED_ELEMENT = 165, 0.062
"""A tile's results: of each, and of each element. The second row: of staged results."""
_SHIFT_ELEMENT = {1: 0.26, 2: 0.26, 4: 0.72, 8: 0.33}
"""What an element takes more where rows of the result begin at multiples of so many bytes."""
_RAGGED_ELEMENT = {1: 0.06, 2: 0.06, 4: 0.03, 8: 0.03}
"""The same of results that pass through shared memory: counted (90 instructions for 1024 elements of a warp, 16 more
where words are written in halves), not measured."""
_INSTRUCTION, _TILE_ELEMENT = 0.0115, 0.069
"""An element's: each instruction of the epilogue, and an operand of its own."""
_HALVED = 0.62
"""The time of results whose rows two consumers share; of three the same is assumed."""
_ARRIVAL, _PARTIAL_RATE = 2840, 50
"""Partial sums: until they are visible and counted, and the bytes that a multiprocessor writes or reads in a cycle."""
_LAUNCH, _MEMORY_RATE = 2800, 2190
_PARTIAL_SECTORS, _MMA_PARTIAL_SECTORS, _RAGGED_SECTORS = 3.3, 1.4, 1.4
"""What bytes of the result cost memory more whose rows do not begin at multiples of a sector (32 bytes). The last
figure, of rows that begin anywhere and pass through shared memory, is taken from the second, not measured."""
_COPY_LAUNCH, _COPY_RATE = 1370, 1630
_JOINED_STEP, _JOINED_ROW, _JOINED_MEMORY, _JOINED_LAUNCH = 240, 0.94, 0.75, 2350
"""Of products in clusters that share k: the least step, what each row of a tile adds to it, the part of memory's time
that no step hides, and the launch. Fitted to 51 timings of ten products on an H100 (15 % off); of these the best
estimate, of all kinds of tiles, took 6 % longer than the best tile."""

_ROWS_LAUNCH, _ROWS_MEMORY_RATE, _ROWS_ARRIVAL = 2310, 1680, 3080
_ROWS_ROW, _ROWS_RATE = 76, 58700
"""What every row adds, and the bytes a cycle that all blocks read of rows."""
_ROWS_ROUND, _ROWS_MEET = 1520, 1.7
"""Until what a ring holds has come, and how the time of a multiprocessor's rings adds to that of memory: as in a norm
of so high an order. Fitted to 171 timings of 27 products (1 to 16 rows, 2 to 100 million weights) on an H100: 7 % off,
and the best of the estimates took 1 % longer than the best tile."""
_SEVERAL_OF_ROOM = 5 / 6
"""Of the clusters that have room, where several share k: 28 of 30 took 2 to 6 % longer than 28 of 39 smaller ones."""
_ROWS_ALONE = 1.04
"""Blocks without a cluster took 5 to 13 % longer than estimated in six products of 2000 to 3000 columns that were not
among those, and those of clusters 1 to 6 %."""
_SHORT_ROWS_LAUNCH = 1000
"""That of small blocks: 12 timings of four products of 17 million weights on an H100 to 3 %; two of 1 million, with a k
of 48 and 88, took 8 and 12 % longer."""
_JOINED_ROWS_LAUNCH, _JOINED_ROWS_MEMORY_RATE, _JOINED_ROWS_RATE = 1500, 1600, 8970
_JOINED_ROWS_SPREAD, _JOINED_ROWS_LOSS = 1.455, 0.23
_JOINED_ROWS_AHEAD, _JOINED_ROWS_SEVERAL = 0.16, 1400
"""The same in clusters that share k: the rates of memory and of rows; how many blocks a multiprocessor should have on
average, and the power with which fewer cost; what of its first rings a launch finds there; and adding up what several
clusters have. Fitted to 417 timings of 27 products of 17 to 25 million weights on an H100: 4 % off, and the best of the
estimates took 1 % longer than the best tile."""
_FEW_ROWS_MEMORY_RATE = 2050
"""The memory rate of tiles of wgmma with so few rows, which took 3 to 7 % longer than with the others' rate."""

_MOMENTS_ELEMENT = 2.5
"""Instructions of a lane for each of its accumulators whose moments it finds: counted, not measured."""
_MOMENTS_JOIN = 2800
"""Until the last tile of a row has joined what the others found: what five products of 768 columns and 17 to 1379 rows
took longer on an H100 than estimated without it, to 4 %."""
_MOMENTS_LAUNCH = 3500
"""What finding moments in a launch of its own takes beside its bytes, which come as fast as those of rows that are
copied: 2.0 µs, the least that pools of EfficientNet-B0 at batch 1 took on an H100 (docs/performance.md). Norms of 4096
rows in the suite `light` took 2.4 µs and 1610 bytes a cycle, from memory, where rows that were just stored are not."""

_MMA_LAUNCH, _MMA_MEMORY_RATE = 755, 2290
_MMA_SHARE, _TALL = 1.08, 1.13
_NARROW_LOADS = {16: 1.0, 8: 1.09, 4: 1.1, 2: 1.5, 1: 7.0}
"""The time of a tile of mma.sync on an H100 beside `mma_cycles`, of one with more than 16 rows, and by the bytes that
are loaded at once of a row of a (of single bytes there are no timings)."""
_MMA_READ, _MMA_SHIFT_ELEMENT = 700, 0.27
"""What its tile takes more where the epilogue has operands, and each element where rows of the result are not
aligned."""


def ranked_wgmma(
    product: Product, operands: Operands, multiprocessors: int, reads: Reads = NOTHING
) -> Iterator[Ranked]:
    """Every tile of wgmma. Rows are copied where they are multiplied in parts, else only where the copy engine cannot
    read them: those that it can, cut by lines of the cache, gained 5 % at best and lost up to 20 % (of 1208×3144×7304).
    `reads`: of the epilogue."""
    for tile in wgmma_tiles(product.m, product.n, product.k, operands, MOST_SPLITS, tiles=PRODUCT_TILES):
        chosen = replace(tile, aligns=operands is Operands.REFINED or not product.suits_tma)
        yield Ranked(chosen, _wgmma_estimate(product, chosen, operands, multiprocessors, reads))


def ranked_batched(product: Product, operands: Operands, multiprocessors: int, reads: Reads) -> Iterator[Ranked]:
    """Every tile of wgmma for products of several matrices, or across the lines of b."""
    for tile in BATCHED_TILES:
        yield Ranked(tile, _wgmma_estimate(product, tile, operands, multiprocessors, reads))


def ranked_staged(product: Product, operands: Operands, multiprocessors: int, reads: Reads) -> Iterator[Ranked]:
    """Every tile of wgmma with staged results."""
    for tile in STAGED_TILES:
        chosen = replace(tile, aligns=operands is Operands.REFINED or not product.suits_tma)
        yield Ranked(chosen, _wgmma_estimate(product, chosen, operands, multiprocessors, reads))


def ranked_short(product: Product, operands: Operands, multiprocessors: int, reads: Reads) -> Iterator[Ranked]:
    """Every tile for many rounds of a single step, of a product that has them."""
    for tile in SHORT_TILES:
        chosen = replace(tile, aligns=operands is Operands.REFINED or not product.suits_tma)
        rounds = tile.tiles(product.m, product.n) / multiprocessors
        if operands.wgmma_steps(product.k) == 1 and rounds >= _MANY_ROUNDS:
            yield Ranked(chosen, _wgmma_estimate(product, chosen, operands, multiprocessors, reads))


def ranked_cluster(product: Product, operands: Operands, multiprocessors: int, reads: Reads) -> Iterator[Ranked]:
    """Every tile of blocks in pairs."""
    for tile in CLUSTER_TILES:
        chosen = replace(tile, aligns=operands is Operands.REFINED or not product.suits_tma)
        yield Ranked(chosen, _wgmma_estimate(product, chosen, operands, multiprocessors, reads))


def ranked_joined(product: Product, operands: Operands, multiprocessors: int, reads: Reads) -> Iterator[Ranked]:
    """Every tile of clusters that share k, of which all have room at once."""
    for tile in JOINED_PRODUCTS:
        together = tile.tiles(product.m, product.n) <= clusters_at_once(tile, multiprocessors)
        if together and has_steps(tile, operands.wgmma_steps(product.k)):
            chosen = replace(tile, aligns=operands is Operands.REFINED or not product.suits_tma)
            yield Ranked(chosen, _wgmma_estimate(product, chosen, operands, multiprocessors, reads))


def _wgmma_estimate(
    product: Product, tile: WgmmaTile, operands: Operands, multiprocessors: int, reads: Reads
) -> Estimate:
    """In a tile of wgmma. Operands are not EXACT."""
    m, n, k, itemsize = product.m, product.n, product.k, operands.itemsize
    tiles = tile.tiles(m, n) * product.batch.count
    sharing = tile.splits * tile.cluster_k
    steps = ceildiv(operands.wgmma_steps(k), sharing)
    blocks = tile.blocks(tiles, multiprocessors)
    waves = 1 if tile.cluster_k > 1 else ceildiv(blocks * sharing, multiprocessors)
    rounds = waves * ceildiv(tiles, blocks)  # tiles of the busiest multiprocessor
    # 128 bytes of k are half as many fp32 operands as halves, at half the rate, and twice as many of fp8.
    multiply = (_STEADY + _NARROW / tile.n) * operands.step_slowness * tile.m * tile.n * 64 / _RATE
    rows = min(tile.m, m) / tile.cluster_n * (1 if tile.aligns else _cut(product.a.stride * itemsize))
    rows += min(tile.n, n) / tile.cluster_m * _cut(product.b.stride * itemsize)
    together = min(blocks * sharing, multiprocessors) / _CACHE_RATE
    least = _LEAST_STEP if tile.cluster_k == 1 else _JOINED_STEP
    step, limit = max((multiply, "products"), (rows * 128 * together, "L2 cache"), (least, "steps"))
    shift = _alignment(n * itemsize)
    if tile.slots:
        fixed, element = _STAGED_FINISH, _STAGED_ELEMENT + _RAGGED_ELEMENT.get(shift, 0)
    else:
        fixed, element = _FINISH, _FINISH_ELEMENT + _SHIFT_ELEMENT.get(shift, 0)
    element += _INSTRUCTION * reads.instructions + (_TILE_ELEMENT if reads.varying else 0)
    if product.found_in(tile) is not None:
        element += _INSTRUCTION * _MOMENTS_ELEMENT
    finish = fixed + tile.m * tile.n * element * (_HALVED if tile.cooperative else 1)
    if tile.splits > 1:
        finish += _ARRIVAL + (tile.splits + 1) * tile.m * tile.n * 4 / _PARTIAL_RATE
    if tile.cluster_k > 1:
        busy = steps * (step + tile.m * _JOINED_ROW) + finish / tile.cluster_k
        busy += joining_cycles(tile, tiles, multiprocessors)
    elif tile.cooperative:
        busy = rounds * (steps * step + finish)
    else:  # one consumer finishes its tile beside the other's product
        busy = max(rounds * steps * step + finish, ceildiv(rounds, 2) * (steps * step + finish))
    if not tile.slots:  # where others bring what the epilogue reads
        busy += waiting_cycles(tile, reads, rounds)
    copy = _COPY_LAUNCH + 2 * m * k * itemsize / _COPY_RATE if tile.aligns else 0
    after = _MOMENTS_JOIN if product.found_in(tile) is not None else _moments_cycles(product)
    rate = _FEW_ROWS_MEMORY_RATE if m <= MOST_ROWS else _MEMORY_RATE
    partial = _RAGGED_SECTORS if tile.slots and shift in _RAGGED_ELEMENT else _PARTIAL_SECTORS
    memory, launch = _touched(product, operands, reads, partial) / rate, _LAUNCH
    if tile.cluster_k > 1:
        memory, launch = memory * _JOINED_MEMORY, _JOINED_LAUNCH
    return Estimate(launch, copy, busy, memory, limit, after)


def _alignment(row_bytes: int) -> int:
    """What the beginnings of rows so far apart are multiples of."""
    return row_bytes & -row_bytes


def _moments_cycles(product: Product) -> float:
    """Of finding the factors of the result's rows in a launch of its own (row_factors.cuh), if they are asked for."""
    if product.factors is None:
        return 0
    return _MOMENTS_LAUNCH + product.m * product.n * product.batch.count * product.factors.dtype.itemsize / _COPY_RATE


def _cut(stride_bytes: int) -> float:
    """What bytes of rows so far apart cost beside those of whole lines of the cache."""
    return _CUT.get(_alignment(stride_bytes), 1) if stride_bytes > 128 else 1


def _touched(product: Product, operands: Operands, reads: Reads, partial: float) -> float:
    """The bytes that come from memory and go there; `partial`: what those of results count in partial sectors."""
    m, n, k = product.m, product.n, product.k
    result = m * n * (partial if n * operands.itemsize % 32 else 1)
    more = m * n * (reads.varying - reads.by_row) / 2  # registers of eight columns
    return product.batch.count * (operands.itemsize * (m * k + k * n + result) + more)


def ranked_mma(
    product: Product, operands: Operands, architecture: Architecture, multiprocessors: int, reads: Reads = NOTHING
) -> Iterator[Ranked]:
    """Every tile of mma.sync."""
    m, n, k, batch = product.m, product.n, product.k, product.batch.count
    tall = _TALL if architecture.wgmma else 1
    share = _MMA_SHARE * _NARROW_LOADS[product.a_access]
    memory = _touched(product, operands, reads, _MMA_PARTIAL_SECTORS) / _MMA_MEMORY_RATE
    shift = _MMA_SHIFT_ELEMENT if _alignment(n * operands.itemsize) in _SHIFT_ELEMENT else 0
    for tile in mma_tiles(m, n, k, batch, architecture, operands, MOST_SPLITS):
        busy = share * mma_cycles(m, n, k, batch, tile, multiprocessors, operands) * (tall if tile.m > 16 else 1)
        blocks = ceildiv(m, tile.m) * ceildiv(n, tile.n) * batch * tile.splits
        busy += ceildiv(blocks, multiprocessors) * tile.m * tile.n * shift
        if reads.fixed or reads.varying:
            busy += ceildiv(blocks, multiprocessors * tile.blocks) * _MMA_READ
        yield Ranked(tile, Estimate(_MMA_LAUNCH, 0, busy, memory, "products", _moments_cycles(product)))


def ranked_rows(
    product: Product, operands: Operands, clusters: bool, multiprocessors: int, reads: Reads = NOTHING
) -> Iterator[Ranked]:
    """Every tile of the kernel for few rows; those of clusters, which have room at once, where there are `clusters`."""
    m, n, k, itemsize = product.m, product.n, product.k, operands.itemsize
    touched, after = _touched(product, operands, reads, 1), _moments_cycles(product)
    alone = _ROWS_ALONE if clusters and n <= MOST_COLUMNS else 1
    for tile in rows_tiles(product):
        groups, resident = ceildiv(n, tile.columns), tile.resident(m)
        blocks, slots = groups * tile.splits, multiprocessors * resident
        share = tile.columns * k * itemsize / tile.splits / tile.ring_bytes  # a block's bytes, in rings
        copied = blocks * m * k * itemsize / tile.splits
        if tile.cluster > 1:
            parts = tile.splits // tile.cluster
            most = clusters_on(ceildiv(tile.cluster, resident), multiprocessors)
            if clusters and groups * parts <= (most if parts == 1 else _SEVERAL_OF_ROOM * most):
                estimate = _joined_rows(tile, blocks, slots, max(1, share), touched, copied, multiprocessors)
                yield Ranked(tile, replace(estimate, after=after))
            continue
        small = tile in SHORT_ROWS_TILES
        if small and k >= LEAST_K and 2 * blocks < slots:  # they have little under way each
            continue
        waves = blocks / slots
        waves = ceildiv(blocks, slots) if waves <= 2 else waves
        rings = waves * max(1, share) * _ROWS_ROUND
        memory = touched / _ROWS_MEMORY_RATE
        delivery = alone * (memory**_ROWS_MEET + rings**_ROWS_MEET) ** (1 / _ROWS_MEET)
        busy = m * _ROWS_ROW + copied / _ROWS_RATE + _ROWS_ARRIVAL * (tile.splits > 1)
        yield Ranked(tile, Estimate(_SHORT_ROWS_LAUNCH if small else _ROWS_LAUNCH, 0, busy, delivery, "rows", after))


def _joined_rows(
    tile: RowsTile, blocks: int, slots: int, rings: float, touched: float, copied: float, multiprocessors: int
) -> Estimate:
    """Of blocks in clusters, `slots` of which would have room; `rings`: how often each fills its rings. Where there is
    room left, the next launch fills its own before this one ends."""
    room = min(1, (slots - blocks) / blocks)
    spread = min(1, blocks / (multiprocessors * _JOINED_ROWS_SPREAD))
    memory = touched / _JOINED_ROWS_MEMORY_RATE * (1 - _JOINED_ROWS_AHEAD * room / rings) / spread**_JOINED_ROWS_LOSS
    busy = copied / _JOINED_ROWS_RATE + _JOINED_ROWS_SEVERAL * (tile.splits > tile.cluster)
    return Estimate(_JOINED_ROWS_LAUNCH, 0, busy, memory, "rows")


def ranked_stream(product: Product, operands: Operands, multiprocessors: int, reads: Reads = NOTHING) -> list[Ranked]:
    """The product in slices of rows, in every way, from what should be the fastest on."""
    after, found = _moments_cycles(product), list[Ranked]()
    for tile in stream_tiles(product, operands):
        cycles = stream_cycles(product, tile, multiprocessors, operands.itemsize, reads)
        found.append(Ranked(tile, Estimate(0, 0, 0, cycles, "slices", after)))
    return sorted(found, key=lambda ranked: ranked.estimate.cycles)
