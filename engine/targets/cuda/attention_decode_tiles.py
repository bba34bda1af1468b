"""Tile shapes of attention of few queries (attention_decode.cuh), and the cost model that says among how many blocks
the keys of a tile are divided. Called by `attention_decode.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.targets.cuda.attention_operands import BiasKind
from engine.targets.cuda.attention_wgmma_tiles import MEMORY_BYTES, shared_limit, warpgroup_cycles
from engine.targets.cuda.kernel import ceildiv

ROWS = 64  # of a tile: queries of all heads that share keys
MOST_SPLITS = 64
_MOST_STAGES = 8


@dataclass(frozen=True)
class Decoding:
    """What there is to do: `tiles` of `rows` rows each, over as many keys. `shared_by` tiles read the same keys.
    `head` and `value` are padded; `key_bytes`: what a key and its value take in memory."""

    tiles: int
    rows: int
    keys: int
    shared_by: int
    head: int
    value: int
    key_bytes: int
    bias: BiasKind


@dataclass(frozen=True)
class DecodeTile:
    """A block: rings of `stages` tiles of `keys` keys and values. `blocks` blocks share a multiprocessor."""

    keys: int
    stages: int
    blocks: int

    def shared_bytes(self, work: Decoding) -> int:
        """q, the rings, biases by key, which tile is in which place, and the barriers (attention_decode.cuh)."""
        head = ceildiv(work.head, 32) * 32
        rings = self.stages * self.keys * (head + work.value) * 2
        biases = self.stages * self.keys * 4 * (work.bias is BiasKind.PER_KEY)
        return (ROWS * head * 2 + rings + biases + 4 * self.stages + 7) // 8 * 8 + 32 * self.stages


def tile_of(work: Decoding) -> DecodeTile:
    """As many keys a tile as registers allow, so that blocks have long copies under way and wait seldom; and as many
    tiles as shared memory holds."""
    widest = max(work.head, work.value)
    # A full bias is as many registers as the scores; beyond 192 features the results take those of two blocks.
    if widest <= 64:
        keys, blocks = 64 if work.bias is BiasKind.FULL else 128, 2
    elif widest <= 128:
        keys, blocks = 64, 2
    elif widest <= 192:
        keys, blocks = 32, 2
    else:
        keys, blocks = 64, 1
    fitting = (
        DecodeTile(keys, stages, blocks)
        for stages in range(_MOST_STAGES, 1, -1)
        if DecodeTile(keys, stages, blocks).shared_bytes(work) <= shared_limit(blocks)
    )
    return next(fitting)


def pick_splits(tile: DecodeTile, work: Decoding, multiprocessors: int) -> int:
    """Among how many blocks the keys of a tile are best divided."""
    most = min(MOST_SPLITS, ceildiv(work.keys, tile.keys))
    return min(range(1, most + 1), key=lambda splits: cycles(tile, splits, work, multiprocessors))


def cycles(tile: DecodeTile, splits: int, work: Decoding, multiprocessors: int) -> float:
    """Estimated cycles at about 1.7 GHz, beside a launch. Rates of the units are those of attention_wgmma_tiles.py;
    those of loads are not measured yet."""
    # A cycle and multiprocessor: of what lies in the L2 cache, and the most that one of few gets from memory.
    l2_bytes, most_bytes = 37, 20
    steps = ceildiv(ceildiv(work.keys, tile.keys), splits)
    tile_bytes = tile.keys * work.key_bytes
    busy, alone = warpgroup_cycles(work.head, work.value, tile.keys, work.bias)
    state_bytes = work.rows * (work.value * 4 + 16)

    def wave(blocks: int) -> float:
        """So many blocks at once: their loads take what is left of memory, of the L2 cache or of the units."""
        resident = ceildiv(blocks, multiprocessors)
        from_memory = (
            tile_bytes / work.shared_by * max(blocks / (multiprocessors * MEMORY_BYTES), resident / most_bytes)
        )
        step = max(alone, resident * busy, resident * tile_bytes / l2_bytes, from_memory)
        # What every block waits for before its first product, and what it writes.
        return 1000 + steps * step + (resident * state_bytes / l2_bytes if splits > 1 else 0)

    time = sum(wave(blocks) for blocks in _waves(work.tiles * splits, multiprocessors * tile.blocks))
    if splits > 1:
        # Another kernel, which has started by then: two trips to the L2 cache, and what passes through it.
        readers = min(multiprocessors, ceildiv(work.tiles * work.rows, 4))
        time += 2500 + work.tiles * splits * state_bytes / (readers * l2_bytes)
    return time


def _waves(blocks: int, slots: int) -> Iterator[int]:
    """How many blocks run at once, until all have run."""
    while blocks > 0:
        yield min(blocks, slots)
        blocks -= slots
