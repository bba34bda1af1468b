"""The tiles of an inverted residual in one launch (conv_block.cuh), what they take of a multiprocessor, and how long
they should take. Called by `conv_block.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from engine.ir.ops import ConvBlock
from engine.plan.plan import Step
from engine.targets.cuda.kernel import ceildiv
from engine.targets.cuda.spaces import VECTOR

_WARPS = 8
_FRAGMENT, _OCTET = 16, 8  # rows of a product; neighbouring results
_KEPT = 40  # registers of a lane for the weights that it keeps as it expands
_HELD = (207, 85, 39)
"""Most of `Work.held` where so many blocks, from one on, share the registers of a multiprocessor without spilling: by
ptxas 13.0, of 1,068 tiles for 23 blocks."""
_RESERVED = 1024  # bytes of shared memory that the system takes for each block


@dataclass(frozen=True)
class Apart:
    """The three convolutions, one after the other, in place of a tile."""


@dataclass(frozen=True)
class BlockTile:
    """Results of a tile: `images` × `rows` × `columns`, of which a warp has two times eight neighbours of `each` rows.
    `panel`: expanded channels at a time."""

    images: int
    rows: int
    columns: int
    each: int
    panel: int

    @property
    def pairs(self) -> int:
        """Of octets: as many warps have results of their own; several share them where that is less than all."""
        return self.images * ceildiv(self.rows, self.each) * ceildiv(self.columns, _OCTET) // 2

    @property
    def splits(self) -> int:
        """Warps that share two octets, each with a part of the channels."""
        return _WARPS // self.pairs


TILES = (
    BlockTile(1, 16, 28, 4, 32), BlockTile(2, 14, 14, 4, 32), BlockTile(2, 14, 14, 4, 64), BlockTile(1, 14, 14, 4, 32),
    BlockTile(1, 14, 14, 4, 64), BlockTile(1, 8, 28, 2, 32), BlockTile(1, 8, 28, 2, 48), BlockTile(1, 8, 28, 2, 64),
    BlockTile(1, 16, 16, 2, 32), BlockTile(1, 16, 16, 2, 64), BlockTile(4, 7, 7, 2, 64), BlockTile(1, 8, 16, 2, 32),
    BlockTile(1, 4, 28, 2, 32), BlockTile(1, 7, 14, 2, 32), BlockTile(1, 7, 14, 2, 64), BlockTile(1, 7, 7, 2, 64),
    BlockTile(1, 8, 8, 2, 64), BlockTile(1, 4, 28, 1, 48), BlockTile(1, 8, 8, 1, 64), BlockTile(1, 4, 8, 1, 64),
)  # fmt: skip
"""Of 59 those that are the fastest of some layer of MobileNetV2 and EfficientNet-lite0 at batch 1 or 128 on an H100, or
within 2 % of it, and a few for shared memory of other sizes."""


@dataclass(frozen=True)
class Sizes:
    """Kernel and stride of the filter, and the channels before and the columns behind, filled up."""

    kernel: int
    stride: int
    channels: int
    columns: int

    @classmethod
    def of(cls, step: Step) -> Sizes:
        assert isinstance(step.op, ConvBlock)
        channels, outputs = step.inputs[1].shape[1], step.inputs[3].shape[0]
        padded = ceildiv(channels, _FRAGMENT) * _FRAGMENT, ceildiv(outputs, VECTOR) * VECTOR
        return cls(step.inputs[2].shape[2], step.op.depthwise.strides[0], *padded)

    @property
    def tap_pairs(self) -> int:
        """Words of two taps of a channel."""
        return ceildiv(self.kernel**2, 2)


@dataclass(frozen=True)
class Work:
    """What a block does in a tile, and what it takes (conv_block.cuh)."""

    tile: BlockTile
    sizes: Sizes

    @cached_property
    def _lines(self) -> tuple[int, int]:
        """Lines of pixels of an image, and the places that each takes."""
        tile, kernel, stride = self.tile, self.sizes.kernel, self.sizes.stride
        below = kernel % 2 if tile.images > 1 else 0
        return (tile.rows - 1) * stride + kernel + below, ceildiv((tile.columns - 1) * stride + kernel, stride) * stride

    @cached_property
    def _fragments(self) -> int:
        return ceildiv(self.tile.images * prod(self._lines), _FRAGMENT)

    @cached_property
    def unit(self) -> int | None:
        """Channels that a warp expands at a time: those that leave the warps the fewest turns, of what has registers
        for its weights."""
        panel, turns = self.tile.panel, dict[int, int]()
        for unit in range(_FRAGMENT, panel + 1, _FRAGMENT):
            if panel % unit == _WARPS % (panel // unit) == 0 and self._steps * unit // 4 <= _KEPT:
                turns[unit] = unit * self._rounds(unit)
        return min(turns, key=lambda unit: (turns[unit], -unit), default=None)

    @property
    def _steps(self) -> int:
        return self.sizes.channels // _FRAGMENT

    def _rounds(self, unit: int) -> int:
        return ceildiv(self._fragments, _WARPS // (self.tile.panel // unit))

    @cached_property
    def panel_bytes(self) -> int:
        """Those of a panel's weights."""
        wide, narrow = 2 * self.sizes.channels + 16, 2 * self.tile.panel + 16
        return self.tile.panel * (wide + 4 * self.sizes.tap_pairs + 8) + self.sizes.columns * narrow

    @cached_property
    def shared_bytes(self) -> int:
        tile, sizes, (height, line) = self.tile, self.sizes, self._lines
        pixels, rows = self._fragments * _FRAGMENT, ceildiv(tile.rows, tile.each) * tile.each
        lines = (tile.images - 1) * height + (rows - 1) * sizes.stride + sizes.kernel + sizes.kernel % 2
        last = (sizes.stride - 1) * (line // sizes.stride) + (sizes.kernel - 1) // sizes.stride
        end = (lines - 1) * line + last + max(0, tile.columns - _OCTET) + _OCTET
        left = (_WARPS - tile.pairs) * tile.each * sizes.columns * 64  # sums of warps that share octets
        wide, narrow = 2 * sizes.channels + 16, 2 * tile.panel + 16
        return max(left, pixels * wide + max(end, pixels) * narrow + 2 * self.panel_bytes)

    @cached_property
    def held(self) -> int:
        """Registers of a thread that the kernel cannot do without beside some that every tile takes, by the numbers
        that it has in them: sums, and what it expands or filters with, whichever is more."""
        unit, each, kernel = self.unit, self.tile.each, self.sizes.kernel
        assert unit is not None
        expanding = self._steps * unit // 4 + unit // 2 + (unit // 4 if unit <= 32 else 0)
        filtering = (kernel // 2 + 1) * 5 + self.sizes.tap_pairs * 3 // 2 + 6 * each
        return each * self.sizes.columns // 2 + max(expanding, filtering)

    def blocks(self, shared_bytes: int) -> int:
        """A multiprocessor's, of so much shared memory; none where the tile does not fit, or a thread would spill."""
        if self.unit is None:
            return 0
        room = shared_bytes // (self.shared_bytes + _RESERVED) or shared_bytes // self.shared_bytes
        return min(room, sum(self.held <= most for most in _HELD))

    def cycles(self, tiles: int, expanded: int, multiprocessors: int, blocks: int) -> float:
        """What so many tiles of `expanded` channels should take. Fitted to 687 times of 14 layers at batch 1 and 128 on
        an H100, with a standard deviation of 11 %; of the fastest 10 % less than they took."""
        assert self.unit is not None
        unit, each, sizes = self.unit, self.tile.each, self.sizes
        panels = ceildiv(expanded, self.tile.panel)
        turns = ceildiv(ceildiv(expanded, _FRAGMENT), panels * self.tile.splits)
        expansions = _WARPS * self._rounds(unit) * unit / 8
        filtered = _WARPS * turns * each
        panel = (
            expansions * (_EXPANDED * self._steps + _STORED)
            + filtered * (2 * sizes.tap_pairs * _FILTERED + sizes.columns / 8 * _PROJECTED)
            + self.panel_bytes / 16 * _COPIED
        )
        resident = min(blocks, ceildiv(tiles, multiprocessors))
        once = _TILE + resident * self._fragments * self._steps * _READ
        rounds = ceildiv(tiles, multiprocessors * blocks)
        return _START + rounds * (panels * (_PANEL + resident * panel) + once)


_START, _TILE, _PANEL = 440, 3400, 600  # cycles of a launch, of a tile and of a panel that nothing hides
_EXPANDED, _FILTERED, _PROJECTED = 3.1, 2.3, 2.95  # of a product of 16 × 8 × 16, with what it reads
_STORED, _COPIED, _READ = 2.3, 0.08, 3.5  # of 16 × 8 expanded values, of 16 bytes of weights, of 16 × 16 pixels
