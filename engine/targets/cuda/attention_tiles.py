"""Tile shapes of the attention kernel and the cost model that ranks them. Called by `attention.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.targets.cuda.architecture import Architecture
from engine.targets.cuda.kernel import ceildiv

MAX_HEAD = 512  # features of q and k a head; beyond, no tile of them fits the shared memory of all architectures
_MAX_SPLITS = 64
LAUNCH = 1500  # cycles until the first loads have come
_SHARED = 99 << 10  # bytes of shared memory a block may have on every architecture


@dataclass(frozen=True)
class Heads:
    """What the registers and the shared memory of a kernel depend on. `itemsize`: bytes of an element of q, k and v;
    `head`, `value`: features of q and k, and of v; `exact`: fp32 operands are not rounded to tf32."""

    head: int
    value: int
    itemsize: int
    exact: bool = False

    @property
    def head_padded(self) -> int:
        return _padded(self.head, 16)

    @property
    def parts(self) -> int:
        """Among how many blocks the features of v are divided: the registers of a warp hold so many of the results."""
        most = 128 if self.itemsize == 4 else 192 if self.head_padded > 256 else 256
        return max(1, ceildiv(self.value, most))

    @property
    def value_padded(self) -> int:
        """Features of v that one block takes."""
        return _padded(ceildiv(self.value, self.parts), 32)

    @property
    def widest(self) -> int:
        return max(self.head_padded, self.value_padded)


def _padded(features: int, multiple: int) -> int:
    """Beyond 128 features in larger steps: fewer kernels, of a kind that is rare."""
    multiple = multiple if features <= 128 else 64
    return max(multiple, ceildiv(features, multiple) * multiple)


@dataclass(frozen=True)
class AttentionTile:
    """A block's tile: `warps` warps of `fragments` × 16 queries, `keys` keys at a time. `ring`: k and v two deep;
    `q_in_registers`: read once from shared memory, not for every tile of keys; `blocks` blocks share a
    multiprocessor's registers."""

    warps: int
    fragments: int
    keys: int
    ring: bool
    q_in_registers: bool
    blocks: int

    @property
    def queries(self) -> int:
        return 16 * self.warps * self.fragments

    def shared_bytes(self, heads: Heads) -> int:
        """Tiles of q, k and v, and two stages of biases (attention_mma.cuh)."""
        k, v = (row_bytes(features, heads.itemsize) for features in (heads.head_padded, heads.value_padded))
        return self.queries * k + (2 if self.ring else 1) * self.keys * (k + v) + 2 * self.keys * 4

    def state(self, heads: Heads) -> int:
        """Numbers that a block keeps between tiles of keys: results, maxima and sums (attention_split.cuh)."""
        return self.warps * self.fragments * (heads.value_padded // 2 + 4) * 32


def row_bytes(features: int, itemsize: int) -> int:
    """Bytes of a row of a tile in shared memory: 64 or a multiple of 128."""
    nbytes = features * itemsize
    return 64 if nbytes <= 64 else ceildiv(nbytes, 128) * 128


def candidates(heads: Heads, causal: bool, full_bias: bool) -> Iterator[AttentionTile]:
    """Tiles whose kernels have no spills on any architecture, and fit the shared memory of all."""
    if heads.itemsize == 2 and heads.widest <= 64:
        # Two rows of fragments halve the reads of k and v; masks and biases on wide heads leave no registers for them.
        if not ((causal or full_bias) and heads.head_padded > 32):
            yield AttentionTile(4, 2, 64, ring=True, q_in_registers=True, blocks=2)
        for warps, blocks in ((4, 3), (2, 4), (1, 8)):
            yield AttentionTile(warps, 1, 64, ring=True, q_in_registers=True, blocks=blocks)
        return
    if heads.itemsize == 2:
        keys, ring, in_registers = (64, True, True) if heads.widest <= 128 else (32, False, False)
    else:
        keys, ring, in_registers = 32 if heads.widest <= (64 if heads.exact else 128) else 16, heads.widest <= 64, False
    if heads.head_padded > 256:
        keys = 16
    for warps in (4, 2, 1):
        tile = AttentionTile(warps, 1, keys, ring, in_registers, 8 // warps)
        if tile.shared_bytes(heads) <= _SHARED:
            yield tile


@dataclass(frozen=True)
class Sizes:
    """How much work there is: `groups` products of batch and heads."""

    queries: int
    keys: int
    groups: int
    causal: bool
    full_bias: bool


def pick(heads: Heads, sizes: Sizes, architecture: Architecture, multiprocessors: int) -> tuple[AttentionTile, int]:
    """The tile, and the number of blocks that share its keys, with the least estimated time."""

    def choices() -> Iterator[tuple[AttentionTile, int]]:
        for tile in candidates(heads, sizes.causal, sizes.full_bias):
            blocks = _blocks(tile, heads, sizes)
            # Keys are divided only to give every multiprocessor something to do, and each block several tiles of them.
            most = min(_MAX_SPLITS, multiprocessors * tile.blocks // max(1, blocks), ceildiv(sizes.keys, 2 * tile.keys))
            yield from ((tile, splits) for splits in range(1, max(1, most) + 1))

    return min(choices(), key=lambda choice: cycles(choice[0], choice[1], heads, sizes, architecture, multiprocessors))


def _blocks(tile: AttentionTile, heads: Heads, sizes: Sizes) -> int:
    return ceildiv(sizes.queries, tile.queries) * sizes.groups * heads.parts


def cycles(
    tile: AttentionTile, splits: int, heads: Heads, sizes: Sizes, architecture: Architecture, multiprocessors: int
) -> float:
    """Estimated cycles of an attention in these tiles."""
    # Multiply-adds, exponentials and bytes from L2 a cycle and multiprocessor (tiles.py; tf32 runs at half the rate).
    rate = 1024 if heads.itemsize == 2 else 512 if not heads.exact else 512 / 3
    exponentials, bytes_per_cycle = 16, 48
    latency = 900  # of one tile of keys: product, maximum, exponential, product
    blocks = _blocks(tile, heads, sizes) * splits
    keys = sizes.keys
    if sizes.causal:
        query_tiles = ceildiv(sizes.queries, tile.queries)
        keys = ceildiv(sum(min(keys, (i + 1) * tile.queries) for i in range(query_tiles)), query_tiles)
    steps = ceildiv(ceildiv(keys, tile.keys), splits)
    rounds = ceildiv(blocks, multiprocessors)  # blocks of the busiest multiprocessor
    resident = min(rounds, tile.blocks, max(1, architecture.shared_bytes // tile.shared_bytes(heads)))
    scores = tile.queries * tile.keys
    step = max(
        scores * (heads.head_padded + heads.value_padded) / rate,
        scores / exponentials,
        tile.keys * (heads.head + heads.value_padded) * heads.itemsize / bytes_per_cycle,
        latency / resident,
    )
    ends = tile.queries * (heads.head + heads.value_padded) * heads.itemsize / bytes_per_cycle
    time = LAUNCH + rounds * (steps * step + ends)
    if splits > 1:
        # States are written, counted, and read again by the last: two trips to memory, and what passes through it.
        time += 1200 + (rounds + splits) * tile.state(heads) * 4 / bytes_per_cycle
    return time
