"""Tile shapes of the matrix kernels and the cost model that ranks them. Called by `gemm.py`, `conv.py` and
`conv_wgmma.py`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from math import hypot
from typing import ClassVar, Generic, TypeAlias, TypeVar

from engine.targets.cuda.architecture import Architecture
from engine.targets.cuda.kernel import Reads, ceildiv

MOST_SPLITS = 24


class Operands(Enum):
    """What the matrix units multiply: (bytes an element, time of a multiply-add on mma.sync beside that of fp16)."""

    HALF = (2, 1)
    """fp16 or bf16"""
    BYTES = (1, 1)
    """e4m3, or integers of 8 bits; k innermost. On mma.sync they become halves in registers; wgmma takes as many bytes
    of them at once as of fp16."""
    TF32 = (4, 2)
    """fp32, rounded"""
    REFINED = (4, 4)
    """fp32, the second a constant. On mma.sync the first is rounded and the second in two parts: two products. On wgmma
    both are in two parts of bf16: three products at twice the rate."""
    EXACT = (4, 6)
    """fp32, in three products"""

    @property
    def itemsize(self) -> int:
        return self.value[0]

    @property
    def slowness(self) -> int:
        return self.value[1]

    @property
    def step_slowness(self) -> float:
        """The time of 128 bytes of k on wgmma beside that of fp16. Of 8 bits, twice as many elements, expected, not
        measured: 1.9 times the rate."""
        return 2 / 1.9 if self.itemsize == 1 else 1

    def wgmma_steps(self, k: int) -> int:
        """The steps of 128 bytes that wgmma takes for so many columns."""
        return 3 * ceildiv(k * 2, 128) if self is Operands.REFINED else ceildiv(k * self.itemsize, 128)


@dataclass(frozen=True)
class MmaTile:
    """A block's tile for mma.sync: `warps_m` × `warps_n` warps share it, `blocks` blocks share a multiprocessor. A step
    takes `k_bytes` of k: 16-bit operands have twice as many elements there as 32-bit ones. `splits` blocks share the k
    of a tile of the result."""

    m: int
    n: int
    k_bytes: int
    warps_m: int
    warps_n: int
    stages: int
    blocks: int
    splits: int = 1

    most_splits: ClassVar[int] = MOST_SPLITS

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.m + self.n) * self.k_bytes

    def config(self, operands: Operands) -> dict[str, int | bool | str]:
        """What kernels/mma/tile.cuh and the kernels on it are told, but for the type of the operands."""
        exact = operands is Operands.EXACT
        # Operands in two parts and sums in two stages, or operands that become others: more registers.
        more = exact or operands.itemsize == 1
        return {
            "tile_m": self.m, "tile_n": self.n, "tile_k_bytes": self.k_bytes, "warps_m": self.warps_m,
            "warps_n": self.warps_n, "stages": self.stages, "blocks": max(1, self.blocks - more),
            "shared_bytes": self.shared_bytes, "exact": exact, "split": self.splits > 1,
        }  # fmt: skip


MMA_TILES = (
    MmaTile(128, 128, 64, 2, 4, 4, 2),
    MmaTile(128, 64, 128, 4, 2, 3, 2),
    MmaTile(128, 32, 128, 4, 1, 3, 3),
    MmaTile(64, 64, 128, 2, 2, 4, 3),
    MmaTile(32, 64, 128, 2, 2, 4, 4),
    MmaTile(16, 64, 128, 1, 2, 6, 4),
)


_BAND = 16
_KEPT_BYTES = 16 << 20
"""Of a second operand, up to which every row of tiles is a band: of 27 products on an H100 whose second operand takes 8
MB or less, bands of one took up to 6 % less in the tile of the best estimate, none more; with 33 MB 1 % less to 2 %
more, with 49 MB 1 % more; nothing in between was measured."""


@dataclass(frozen=True)
class WgmmaTile:
    """A tile for wgmma, 128 bytes of k a step. Two consumer warpgroups take tiles in turn, or (`cooperative`) two or
    three share the rows of each. `splits` blocks share the k of a tile of the result. One copy brings `panel_bytes` of
    k of the first operand, whose rows another kernel has copied to multiples of 128 bytes where the tile `aligns`. With
    `slots` results go to memory through shared memory, where so many panels of each consumer's tile have room
    (kernels/mma/staging.cuh). `batched`: of several matrices, or across the lines of b (kernels/mma/batch_load.cuh).
    `cluster_m`, `cluster_n`: how many blocks with neighbouring tiles along m or n form a cluster, two or none, and load
    what their tiles share once (kernels/mma/cluster.cuh). `cluster_k`: the blocks, or pairs of them, of a cluster that
    share the k of a single tile (kernels/scheduler/joined_k.cuh).
    """

    m: int
    n: int
    stages: int
    cooperative: bool = False
    splits: int = 1
    panel_bytes: int = 128
    aligns: bool = False
    slots: int = 0
    batched: bool = False
    cluster_m: int = 1
    cluster_n: int = 1
    cluster_k: int = 1
    k_bytes: ClassVar[int] = 128

    @property
    def consumers(self) -> int:
        """The consumer warpgroups: three for rows that two cannot halve into whole instructions, of 64."""
        return 3 if self.cooperative and self.m % 128 else 2

    @property
    def threads(self) -> int:
        """Of a block: a producer's warpgroup beside the consumers."""
        return 128 * (1 + self.consumers)

    @property
    def cluster(self) -> int:
        """The blocks of a cluster."""
        return self.cluster_m * self.cluster_n

    def tiles(self, m: int, n: int) -> int:
        """The tiles of a result of m × n, with those that lie outside it in clusters that reach into it."""
        return self.cluster * ceildiv(m, self.m * self.cluster_m) * ceildiv(n, self.n * self.cluster_n)

    def band(self, b_bytes: int) -> int:
        """Rows of tiles (of clusters) in a band (kernels/scheduler/tiles.cuh). A second operand that the L2 cache keeps
        is read whole for every row of tiles: then rows of the first come once, and what is stored lies together. Those
        whose k is split, which are few, have no registers for another order (the gate shows spills)."""
        return 1 if b_bytes <= _KEPT_BYTES and self.splits == 1 else _BAND // self.cluster_m

    def blocks(self, tiles: int, multiprocessors: int) -> int:
        """The persistent blocks that share so many tiles: one a multiprocessor, in whole clusters."""
        return min(tiles, self.cluster * max(1, multiprocessors // (self.splits * self.cluster)))

    @property
    def shared_bytes(self) -> int:
        """The ring, and the barriers `full` and `empty` of each stage and `turn` of each consumer; with slots `ready`
        and `written` of each, and then, from a multiple of 1024 bytes on, these."""
        ring = self.stages * (self.m + self.n) * 128 + 8 * (2 * self.stages + self.consumers)
        if self.cluster_k > 1:  # a barrier, and what the blocks send each other
            pieces = self.n // 16 * (self.consumer_rows // 64)  # of a lane, as many of each block as of the first
            sums = self.m * self.n * 4 // pieces * ceildiv(pieces, self.cluster_k) * self.cluster_k
            return ceildiv(ring + 8, 16) * 16 + sums
        if not self.slots:
            return ring
        return (
            ceildiv(ring + 8 * (2 * self.slots + 1) * self.consumers, 1024) * 1024
            + self.consumers * self.slots * self.consumer_rows * self.staged_columns * 2
        )

    @property
    def consumer_rows(self) -> int:
        """The rows of a tile that one consumer has."""
        return self.m // self.consumers if self.cooperative else self.m

    @property
    def accumulators(self) -> int:
        """The registers of a lane for sums."""
        return self.consumer_rows * self.n // 128

    @property
    def staged_columns(self) -> int:
        """The columns of a panel of results: a row of one is as long as a swizzle."""
        return 64 if self.n % 64 == 0 else 32

    @property
    def config(self) -> dict[str, int | bool | str]:
        return {
            "tile_m": self.m, "tile_n": self.n, "stages": self.stages, "consumers": self.consumers,
            "cooperative": self.cooperative, "shared_bytes": self.shared_bytes, "split": self.splits > 1,
            "panel_bytes": self.panel_bytes, "cluster_m": self.cluster_m, "cluster_n": self.cluster_n,
            "cluster_k": self.cluster_k,
            **({"slots": self.slots} if self.slots else {}),
        }  # fmt: skip

    @property
    def divides_rows(self) -> bool:
        """Whether rows of the first operand can be divided in it (kernels/mma/divided_rows.cuh): 128 accumulators leave
        no registers for that beside partial sums (the gate shows spills)."""
        return not self.batched and (self.splits == 1 or self.consumer_rows * self.n < 128 * 128)

    @property
    def finds_moments(self) -> bool:
        """Whether a product in it finds the moments of its rows (kernels/mma/staging.cuh)."""
        return self.slots > 0

    @property
    def most_splits(self) -> int:
        """128 rows of a consumer leave it no registers to add partial sums beside 128 accumulators, nor do 224
        columns (the gate shows spills). Staged results, those of several matrices, and those of clusters and of three
        consumers, which are for products that fill the device, are whole."""
        full = (self.consumer_rows == 128 and self.n >= 128) or self.n == 224 or self.consumers > 2
        return 1 if full or self.slots or self.batched or self.cluster > 1 or self.cluster_k > 1 else MOST_SPLITS


WGMMA_TILES = (
    WgmmaTile(128, 128, 6),
    WgmmaTile(128, 64, 8),
    WgmmaTile(128, 32, 5),
    WgmmaTile(64, 192, 6),
    WgmmaTile(64, 128, 8),
    WgmmaTile(64, 64, 12),
    WgmmaTile(64, 32, 16),
    WgmmaTile(128, 256, 4, cooperative=True),
    WgmmaTile(128, 192, 5, cooperative=True),
    WgmmaTile(128, 128, 6, cooperative=True),
    WgmmaTile(128, 96, 7, cooperative=True),
)

PRODUCT_TILES = (
    *WGMMA_TILES,
    WgmmaTile(128, 224, 5, cooperative=True),
    WgmmaTile(128, 160, 6, cooperative=True),
    WgmmaTile(64, 160, 7),
    WgmmaTile(64, 96, 10),
    WgmmaTile(192, 192, 4, cooperative=True),
    WgmmaTile(192, 128, 5, cooperative=True),
)
"""Tiles of plain products: sizes in between fill a last round that others leave half empty."""

STAGED_TILES = (
    WgmmaTile(128, 256, 4, cooperative=True, slots=2),
    WgmmaTile(128, 192, 4, cooperative=True, slots=3),
    WgmmaTile(128, 96, 7, cooperative=True, slots=3),
    WgmmaTile(128, 192, 4, slots=2),
    WgmmaTile(128, 128, 5, slots=2),
    WgmmaTile(128, 64, 8, slots=1),
    WgmmaTile(192, 192, 4, cooperative=True, slots=1),
    WgmmaTile(192, 128, 4, cooperative=True, slots=2),
    WgmmaTile(128, 160, 5, cooperative=True, slots=3),
    WgmmaTile(128, 96, 5, slots=3),
    WgmmaTile(64, 128, 8, slots=2),
)
"""Tiles of products whose results go through shared memory."""

SHORT_TILES = (WgmmaTile(64, 64, 9, slots=4),)
"""The same for a k of one step and many rounds of tiles, whose time is memory's: 64→256@56 at batch 128 took 96.0 µs on
an H100, 98.9 in the best of the others; longer sums take up to 40 % more in it."""

BATCHED_TILES = (
    WgmmaTile(128, 256, 4, cooperative=True, batched=True),
    WgmmaTile(128, 128, 6, batched=True),
    WgmmaTile(128, 64, 8, batched=True),
    WgmmaTile(64, 64, 12, batched=True),
)
"""Tiles of products of several matrices, and across the lines of b."""

CLUSTER_TILES = (
    WgmmaTile(128, 256, 4, cooperative=True, cluster_m=2),
    WgmmaTile(128, 192, 5, cooperative=True, cluster_m=2),
    WgmmaTile(128, 128, 6, cluster_m=2),
    WgmmaTile(128, 128, 6, cluster_n=2),
    WgmmaTile(128, 256, 4, cooperative=True, slots=2, cluster_m=2),
    WgmmaTile(128, 256, 4, cooperative=True, slots=2, cluster_n=2),
    WgmmaTile(128, 192, 4, cooperative=True, slots=3, cluster_m=2),
    WgmmaTile(128, 192, 4, slots=2, cluster_m=2),
    WgmmaTile(128, 192, 4, slots=2, cluster_n=2),
    WgmmaTile(192, 128, 5, cooperative=True, cluster_n=2),
    WgmmaTile(192, 192, 4, cooperative=True, cluster_n=2),
    WgmmaTile(192, 128, 4, cooperative=True, slots=2, cluster_n=2),
    WgmmaTile(192, 128, 4, cooperative=True, slots=2, cluster_m=2),
    WgmmaTile(128, 128, 5, slots=2, cluster_m=2),
    WgmmaTile(192, 192, 4, cooperative=True, cluster_m=2),
    WgmmaTile(192, 192, 4, cooperative=True, slots=1, cluster_m=2),
    WgmmaTile(128, 96, 7, cooperative=True, cluster_m=2),
    WgmmaTile(128, 96, 7, cooperative=True, cluster_n=2),
    WgmmaTile(128, 96, 7, cooperative=True, slots=2, cluster_n=2),
    WgmmaTile(64, 128, 8, cluster_n=2),
    WgmmaTile(64, 160, 7, cluster_n=2),
)
"""Tiles of clusters of two blocks, with results staged or not."""

Tile: TypeAlias = MmaTile | WgmmaTile
T = TypeVar("T", MmaTile, WgmmaTile)
AnyTile = TypeVar("AnyTile", covariant=True)


@dataclass(frozen=True)
class Choice(Generic[AnyTile]):
    """A tile, and the cycles that it should take."""

    tile: AnyTile
    cycles: float


# Per multiprocessor and clock: multiply-adds on fp16 (NVIDIA's architecture papers: A100 1024, H100 2048). bf16 is as
# fast, tf32 half as fast.
_MMA_RATE = 1024
_WGMMA_RATE = 2048


_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, MOST_SPLITS)
_MAX_PARTIAL_BYTES = 32 << 20  # the partial sums of a product are to stay in the L2 cache
_ARRIVAL = 3800
"""Cycles to make a partial sum visible, count it, and begin to read the others (fitted with the constants of wgmma)."""
_PARTIAL_RATE = 39
"""Bytes of partial sums that a multiprocessor writes or reads in a cycle (fitted with the others)."""


_JOINING, _JOINED_RATE, _JOINED_SHARE = 440, 13, 0.9
"""Sums that blocks of a cluster send each other: cycles until they are there; the bytes that each gets in a cycle where
few blocks do so, and how much longer it takes where all do. Fitted to 250 timings of 11 layers at batch 1 on an H100
(11 % off)."""
_CLUSTERS = {2: 66, 3: 39, 4: 30, 5: 22, 6: 17, 8: 15}
"""The clusters of so many blocks that 132 multiprocessors have room for at once, as an H100 says."""
_STAGED_FINISH, _STAGED_ELEMENT, _STAGED_DRAIN = 300, 0.02, 900
"""Cycles to hand on a tile of staged results, as `product_cost` has them, and until the last ones have left: layers of
one round took 0.2 µs longer staged, larger ones 2 to 8 % less."""


ROUND_TRIP = 1500
"""Cycles that a consumer waits for an operand of the epilogue that it could not fetch before the product: residuals of
64@56, 64→256@56 and 256→1024@14 in tiles whose registers hold a part of them, on an H100 (1300 to 2400)."""
_CONSUMER_ROOM = {2: 160, 3: 88}
"""Registers of one of so many consumers for accumulators and operands of the epilogue (mma/wgmma_pipeline.cuh)."""
NOTHING = Reads()


def late_fetches(reads: Reads, pieces: int, groups: int, room: int, chunk: int = 1) -> int:
    """How often a consumer waits for what its epilogue reads of a tile, as kernels/epilogue/early.cuh goes about it:
    `pieces` of eight columns a lane, `chunk` at once, from `groups` of columns, with `room` registers for operands."""
    if not reads.varying:
        return 0  # what is the same in every row is in the cache
    held = reads.fixed * groups + 2 * chunk * reads.varying <= room
    each = reads.varying + (0 if held else reads.fixed)
    depth = (room - held * reads.fixed * groups) // each // chunk * chunk
    return ceildiv(pieces, max(chunk, depth)) - 1


def pick_mma(
    m: int,
    n: int,
    k: int,
    batch: int,
    architecture: Architecture,
    multiprocessors: int,
    operands: Operands = Operands.HALF,
    most_splits: int = 1,
) -> MmaTile:
    """The tile with the least estimated time among those whose ring fits the architecture."""
    return min(
        mma_tiles(m, n, k, batch, architecture, operands, most_splits),
        key=lambda tile: mma_cycles(m, n, k, batch, tile, multiprocessors, operands),
    )


def mma_tiles(
    m: int, n: int, k: int, batch: int, architecture: Architecture, operands: Operands, most_splits: int
) -> Iterator[MmaTile]:
    """Every tile of mma.sync whose ring fits the architecture, with k in one part or in up to `most_splits`."""
    fitting = [tile for tile in MMA_TILES if tile.shared_bytes <= architecture.shared_bytes]
    return _split(fitting, m, n, k * operands.itemsize, batch, most_splits)


def _split(tiles: Iterable[T], m: int, n: int, k_bytes: int, batch: int, most: int) -> Iterator[T]:
    """Every tile with k in one part or in up to `most`: at least two steps each, and none without any."""
    for tile in tiles:
        steps, count = ceildiv(k_bytes, tile.k_bytes), ceildiv(m, tile.m) * ceildiv(n, tile.n) * batch
        for splits in _SPLITS:
            uses_all = (splits - 1) * ceildiv(steps, splits) < steps
            fits = 2 * splits <= steps and count * splits * tile.m * tile.n * 4 <= _MAX_PARTIAL_BYTES
            if splits == 1 or (splits <= min(most, tile.most_splits) and uses_all and fits):
                yield replace(tile, splits=splits)


def mma_cycles(m: int, n: int, k: int, batch: int, tile: MmaTile, multiprocessors: int, operands: Operands) -> float:
    """Estimated cycles of a product in tiles of mma.sync."""
    bytes_per_cycle, launch = 48, 1500  # from L2, 64 nominal; first loads and the drain of the last tile
    blocks = ceildiv(m, tile.m) * ceildiv(n, tile.n) * batch * tile.splits
    tile_k = tile.k_bytes // operands.itemsize
    multiply = tile.m * tile.n * tile_k * operands.slowness / _MMA_RATE
    step = max(multiply, (tile.m + tile.n) * tile.k_bytes / bytes_per_cycle)
    # A lone block hides little of its own latency: charge a step as at least this many cycles, shared by its
    # neighbours.
    step = max(step, 250 / tile.blocks)
    epilogue = tile.m * tile.n * 4 / bytes_per_cycle
    steps = ceildiv(ceildiv(k, tile_k), tile.splits)
    time = launch + ceildiv(blocks, multiprocessors) * (steps * step + epilogue)
    return time if tile.splits == 1 else time + _ARRIVAL + (tile.splits + 1) * tile.m * tile.n * 4 / _PARTIAL_RATE


def pick_wgmma(
    m: int,
    n: int,
    k: int,
    multiprocessors: int,
    operands: Operands = Operands.HALF,
    most_splits: int = 1,
    reads: Reads = NOTHING,
) -> WgmmaTile:
    """The wgmma tile with the least estimated time. Operands are not EXACT; `reads`: of the epilogue."""
    return min(
        wgmma_tiles(m, n, k, operands, most_splits),
        key=lambda tile: wgmma_cycles(m, n, k, tile, multiprocessors, operands, reads=reads),
    )


def wgmma_tiles(
    m: int,
    n: int,
    k: int,
    operands: Operands,
    most_splits: int,
    groups: int = 1,
    panel_bytes: int = 128,
    tiles: Iterable[WgmmaTile] = WGMMA_TILES,
) -> Iterator[WgmmaTile]:
    """Every one of the tiles, with k in one part or in up to `most_splits`."""
    wide = (replace(tile, panel_bytes=panel_bytes) for tile in tiles)
    return _split(wide, m, n, 128 * operands.wgmma_steps(k), groups, most_splits)


@dataclass(frozen=True)
class Rates:
    """What the time of wgmma depends on. A multiplication takes `steady` and `narrow` divided by the columns of a tile
    of its nominal time (wide instructions read less shared memory for each). A step takes the copy engine `row` cycles
    for each row of the first operand and `line` for each line of the L2 cache that it lies in, `column` for each of the
    second, `outside` for each of the second that there is not. `memory`: the bytes a cycle that all multiprocessors
    get. `beside`: the part of its epilogue that a cooperative tile adds to its products. `start`: cycles before the
    first product and after the last."""

    steady: float
    narrow: float
    memory: float
    row: float
    line: float
    column: float
    outside: float
    beside: float
    start: float


PRODUCTS = Rates(0.93, 55, 1294, row=1.91, line=0, column=1.91, outside=1.91, beside=0.05, start=1920)
"""Fitted to a sweep of all tiles and splits over 28 shapes of fp16 on an H100 (products of transformers and of 1×1
convolutions, 600 timings): the tile picked took 1 % longer than the best one on average, 9 % at worst."""
GATHERED = Rates(0.88, 49, 1800, row=2.0, line=1.84, column=1.26, outside=6.3, beside=0.62, start=2540)
"""Patches of convolutions: fitted to sweeps of 4 to 8 tiles over 75 layers on an H100 (ResNet, VGG, ResNeXt, RegNet,
EfficientNet, ConvNeXt; 11 % off), `outside` to 250 timings of others. The tile picked took 1 % longer than the best one
on average, 15 % at worst; 2 % and 26 % on the 27 layers of the second sweep with constants fitted to the first (12 %
off). A pixel of 128 bytes costs the copy engine twice what a row of a matrix does."""


def wgmma_cycles(
    m: int,
    n: int,
    k: int,
    tile: WgmmaTile,
    multiprocessors: int,
    operands: Operands,
    groups: int = 1,
    nbytes: int | None = None,
    rates: Rates = PRODUCTS,
    reads: Reads = NOTHING,
    lines: float = 1,
) -> float:
    """Estimated cycles of `groups` products in tiles of wgmma. `nbytes`: what they touch in memory, where that is not
    just the matrices. `reads`: of the epilogue. `lines` of the L2 cache that the bytes of a copy's row lie in. The
    constants that are not of `rates` are fitted with those of `PRODUCTS`.
    """
    wide = max(tile.n, tile.m * tile.n // 128)  # 256 × 128 is as fast as 128 × 256
    slowdown, least_step = rates.steady + rates.narrow / wide, 202  # cycles
    epilogue, start = 955 + 0.013 * tile.m * tile.n, rates.start
    tiles, sharing = tile.tiles(m, n), tile.splits * tile.cluster_k
    steps = ceildiv(operands.wgmma_steps(k), sharing)
    # 128 bytes of k are half as many fp32 operands as halves, at half the rate.
    # A row of a narrow panel costs the copy engine what one of 128 bytes costs.
    columns = n / ceildiv(n, tile.n * tile.cluster_n) / tile.cluster_n  # of a tile, on average
    # What blocks in pairs share each brings half of.
    copies = tile.m * 128 // tile.panel_bytes * (rates.row + rates.line * lines) / tile.cluster_n
    copies += (columns * rates.column + (tile.n - columns) * rates.outside) / tile.cluster_m
    multiply = slowdown * operands.step_slowness * tile.m * tile.n * 64 / _WGMMA_RATE
    step = max(multiply, copies, least_step)
    blocks = tile.blocks(tiles, multiprocessors // (tile.cluster_k * groups))
    waves = ceildiv(blocks * sharing * groups, multiprocessors)
    rounds = waves * ceildiv(tiles, blocks)  # tiles of the busiest multiprocessor
    if tile.slots:
        epilogue, start = _STAGED_FINISH + tile.m * tile.n * _STAGED_ELEMENT, start + _STAGED_DRAIN
    if tile.cluster_k > 1:  # every block finishes its part of the tile
        rounds = ceildiv(tiles * groups, clusters_at_once(tile, multiprocessors))
        epilogue = epilogue / tile.cluster_k + joining_cycles(tile, tiles * groups, multiprocessors)
        time = rounds * (steps * step + epilogue)
    elif tile.cooperative:
        time = rounds * (steps * step + rates.beside * epilogue)
    else:
        # One consumer's epilogue runs beside the other's product.
        time = max(rounds * steps * step + epilogue, ceildiv(rounds, 2) * (steps * step + epilogue))
    if tile.splits > 1:
        time += _ARRIVAL + (tile.splits + 1) * tile.m * tile.n * 4 / _PARTIAL_RATE
    touched = nbytes or operands.itemsize * groups * (m * k + k * n + m * n)
    return start + hypot(time, touched / rates.memory) + waiting_cycles(tile, reads, rounds)


def clusters_at_once(tile: WgmmaTile, multiprocessors: int) -> int:
    """The tiles whose clusters have room beside each other, where these share k."""
    return tile.cluster * max(1, _CLUSTERS[tile.cluster * tile.cluster_k] * multiprocessors // 132)


def clusters_on(size: int, multiprocessors: int) -> int:
    """How many clusters have room at once that take so many multiprocessors each."""
    if size == 1:
        return multiprocessors
    return _CLUSTERS[min(known for known in _CLUSTERS if known >= size)] * multiprocessors // 132


def joining_cycles(tile: WgmmaTile, tiles: int, multiprocessors: int) -> float:
    """Until the blocks that share the k of a tile have each other's sums, where there are so many tiles."""
    sent = tile.m * tile.n * 4 * (1 - 1 / tile.cluster_k)
    share = min(1, tiles * tile.cluster_k / multiprocessors)
    return _JOINING + sent / _JOINED_RATE * (1 + _JOINED_SHARE * share)


def waiting_cycles(tile: WgmmaTile, reads: Reads, rounds: int) -> int:
    """The cycles in which epilogues of `rounds` tiles wait for what they read."""
    accumulators, room = tile.accumulators, _CONSUMER_ROOM[tile.consumers]
    if tile.splits == 1:
        waits = late_fetches(reads, accumulators // 8, tile.n // 32, room - accumulators)
    else:  # nothing is fetched before partial sums are added
        waits = ceildiv(accumulators // 8, 4) if reads.varying else 0
    return waits * ROUND_TRIP * (rounds if tile.cooperative else ceildiv(rounds, 2))
