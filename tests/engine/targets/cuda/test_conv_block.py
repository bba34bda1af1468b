"""Inverted residuals in one launch against float64, on random ragged shapes (conftest.py says on what), and which
convolutions can be one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.ir.dtype import DType
from engine.ir.ops import Conv, ConvBlock
from engine.plan.plan import Step
from engine.plan.tensor import BufferKind
from engine.targets.cuda import conv_block
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.conv_block import estimates, lower, lower_apart, lower_in, tiles_of
from engine.targets.cuda.conv_block_tiles import TILES, Apart, BlockTile, Sizes, Work
from engine.targets.cuda.conv_choices import block_key
from engine.targets.cuda.covering import F16, block_step
from engine.targets.cuda.families import traits_of
from engine.targets.cuda.kernel import Context, WeightStore
from engine.targets.cuda.tunables import tunables
from tests.engine.targets.cuda.cases import check, check_late, ragged, rng_of, told
from tests.engine.targets.cuda.harness import Case, Runner
from tests.engine.targets.cuda.wrong_kernels import check_is_caught, emulator_or_skip

CONTEXT = Context(SM_90A, 132, WeightStore())
WRONG = {
    "weights that have not all come": ("copy_async_wait<0>();", "copy_async_wait<1>();"),
    "a panel is filtered before all have expanded it": ("W2_BYTES, e);\n    __syncthreads();", "W2_BYTES, e);"),
    "a panel is expanded while others filter the one before": (
        "    __syncthreads();  // the panel's weights", "    // ",
    ),
    "pixels beside the image are not zeros": ("share.is_there(round, i) ? word : 0", "word"),
    "sums that the warps of an octet have not all left": (
        "  __syncthreads();\n  if (split > 0) return;", "  if (split > 0) return;",
    ),
}  # fmt: skip
"""What takes the place of what."""


def tiles(step: Step, context: Context) -> list[BlockTile]:
    return [choice.tile for choice in estimates(step, context)]


def test_blocks_match_float64(runner: Runner, count: int) -> None:
    """Every tile, kernels of 3, 4 and 5, both strides, ragged channels and sizes, pads on either side, residuals, both
    types, images that are smaller than a tile."""
    rng, cases = rng_of("blocks"), list[Case]()
    while len(cases) < count:
        dtype = F16 if rng.random() < 0.7 else DType.BF16
        kernel, stride = int(rng.choice([3, 4, 5])), int(rng.choice([1, 2]))
        channels, expanded = 8 * int(rng.integers(1, 13)), 8 * int(rng.integers(1, 20))
        residual = stride == kernel % 2 == 1 and rng.random() < 0.4
        outputs = channels if residual else ragged(rng, 192, 8)
        pad = kernel // 2
        down, across = ((int(rng.integers(0, kernel)), int(rng.integers(0, kernel))) for _ in range(2))
        pads = ((pad, pad), (pad, pad)) if residual else (down, across)
        x = (int(rng.integers(1, 4)), channels, int(rng.integers(kernel, 20)), int(rng.integers(kernel, 20)))
        activation = str(rng.choice(["relu6", "silu", "none"]))
        step = block_step(x, expanded, outputs, kernel, stride, pads, residual, dtype, activation)
        fitting = tiles(step, runner.context)
        if not fitting:
            continue
        tile = fitting[int(rng.integers(len(fitting)))]
        label = f"{x} {expanded} {outputs} {kernel} {stride} {pads} {tile}"
        lowered = lower_in(step, tile, runner.context)
        cases.append(Case(label, step, channels + expanded, lowered=lowered))
    check_late(runner, cases)


@pytest.mark.parametrize("what", WRONG)
def test_the_emulator_shows_a_wrong_kernel(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = emulator_or_skip()
    step = block_step((2, 24, 9, 11), 136, 40)
    tile = next(tile for tile in tiles(step, runner.context) if tile.panel == 32 and tile.pairs == 4)
    case = Case(what, step, 160, lowered=lower_in(step, tile, runner.context))
    check(runner, [case])
    check_is_caught(runner, case, WRONG[what], monkeypatch)


def test_apart_they_match_float64(runner: Runner) -> None:
    steps = [block_step((2, 16, 9, 11), 96, 24, stride=2), block_step((1, 24, 7, 7), 144, 24, 5, residual=True)]
    apart = [conv_block.lower_apart(step, runner.context) for step in steps]
    check(runner, [Case("apart", step, 200, lowered=lowered) for step, lowered in zip(steps, apart, strict=True)])


def test_what_the_kernel_takes() -> None:
    usual = block_step((2, 24, 14, 14), 144, 24, residual=True)
    assert tiles(usual, CONTEXT)
    op = usual.op
    assert isinstance(op, ConvBlock)
    wide = block_step((2, 24, 14, 14), 144, 320)
    odd = block_step((2, 12, 14, 14), 72, 24)
    large = block_step((2, 24, 14, 14), 144, 24, 7)
    dilated = replace(usual, op=replace(op, depthwise=replace(op.depthwise, dilations=(2, 2), pads=((2, 2), (2, 2)))))
    small = block_step((2, 24, 14, 14), 144, 24, 2)
    deep = block_step((2, 168, 14, 14), 336, 24)
    for step in (wide, odd, large, dilated, small, deep):
        assert not tiles(step, CONTEXT)
        assert all(isinstance(one.step.op, Conv) for one in tunables(step, CONTEXT))


def test_what_should_be_the_fastest_is_taken_unless_another_way_was_timed() -> None:
    large, deep = block_step((32, 24, 56, 56), 144, 24), block_step((1, 160, 7, 7), 960, 160)
    assert [told(lower(step, CONTEXT)) == told(lower_apart(step, CONTEXT)) for step in (large, deep)] == [False, True]
    for step in (large, deep):
        ways = tiles_of(step, CONTEXT)
        assert [way.cycles for way in ways] == sorted(way.cycles for way in ways)
        assert sum(isinstance(way.tile, Apart) for way in ways) == 1
        (*_, own) = tunables(step, CONTEXT)
        for i, _ in enumerate(own.candidates):
            timed = replace(CONTEXT, choices={own.key: own.choice(i, 1.0)})
            assert told(lower(step, timed)) == told(own.launches(i, CONTEXT)) and own.chosen(timed) == i
        assert "three convolutions" in [candidate.text for candidate in own.candidates]


def test_the_three_convolutions_are_timed_first_and_stand_beside_the_tiles() -> None:
    step = block_step((32, 24, 56, 56), 144, 24)
    *inner, own = tunables(step, CONTEXT)
    assert [one.step.op for one in inner] == [one.op for one in conv_block.convolutions(step)]
    assert len({one.key for one in (*inner, own)}) == 4
    for one in inner:
        timed = replace(CONTEXT, choices={one.key: one.choice(1, 1.0)})
        assert told(lower_apart(step, timed)) != told(lower_apart(step, CONTEXT))
    flops = sum(one.step.cost.flops for one in inner)
    assert flops == step.cost.flops
    assert all(tensor.buffer.kind is BufferKind.ARENA for tensor in inner[1].step.inputs[:1])


def test_blocks_of_other_convolutions_have_other_keys() -> None:
    steps = [
        block_step((32, 24, 56, 56), 144, 24), block_step((32, 24, 56, 56), 144, 24, residual=True),
        block_step((32, 24, 56, 56), 144, 24, 5), block_step((32, 24, 56, 56), 144, 24, stride=2),
        block_step((32, 24, 56, 56), 136, 24), block_step((32, 24, 56, 56), 144, 24, activation="silu"),
        block_step((32, 24, 56, 56), 144, 24, dtype=DType.BF16), block_step((16, 24, 56, 56), 144, 24),
    ]  # fmt: skip
    assert len({block_key(conv_block.convolutions(step), CONTEXT) for step in steps}) == len(steps)


def test_no_tile_takes_more_than_there_is() -> None:
    """Shared memory of a block and of a multiprocessor, and warps that come out even."""
    for sizes in (Sizes(3, 1, 32, 24), Sizes(5, 2, 16, 40), Sizes(3, 2, 96, 160), Sizes(5, 1, 112, 112)):
        for work in (Work(tile, sizes) for tile in TILES):
            blocks = work.blocks(SM_90A.shared_bytes)
            assert blocks == 0 or blocks * work.shared_bytes <= SM_90A.shared_bytes
    for tile in TILES:
        assert tile.pairs * tile.splits == 8
        assert tile.panel // 16 % tile.splits == 0


def test_targets_with_warpgroups_fuse_blocks() -> None:
    assert traits_of(SM_90A).conv_blocks is conv_block.LIMITS
    assert traits_of(SM_80).conv_blocks is None
