"""Which kernel a convolution gets, and what its phases and packed weights are. Needs no GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from engine.ir.dtype import DType
from engine.ir.ops import Conv
from engine.plan.plan import Step
from engine.plan.tensor import BufferKind
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import ARCHITECTURES, SM_80, SM_90A
from engine.targets.cuda.conv import filters_of, launch_conv, lower
from engine.targets.cuda.conv_geometry import Geometry, pack_filter, pack_taps
from engine.targets.cuda.conv_stem import StemTile, is_stem, launch_stem
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from engine.targets.cuda.depthwise import candidates, is_depthwise_product, launch_depthwise_product, window_of
from engine.targets.cuda.kernel import Context, Launch, Pointer, WeightStore
from engine.targets.cuda.tiles import MMA_TILES
from tests.engine.targets.cuda.cases import rng_of
from tests.engine.targets.cuda.test_conv import random_shape

F64 = DType.F64


def conv_step(
    x: tuple[int, ...], w: tuple[int, ...], dtype: DType = F16, strides: int = 1, groups: int = 1, pad: int = 0,
    transposed: bool = False, known: bool = True,
) -> Step:  # fmt: skip
    axes = len(x) - 2
    op = Conv((strides,) * axes, ((pad, pad),) * axes, (1,) * axes, groups, transposed, (), (cv.stored(ACC, dtype),))
    return make_step(op, [(dtype, x), weight(*w, dtype=dtype) if known else (dtype, w)])


CONTEXT = Context(SM_80, 108, WeightStore())


def launches(step: Step, tf32: bool = False) -> list[Launch]:
    return lower(step, replace(CONTEXT, tf32=tf32))


def kernels(step: Step) -> list[str]:
    """The files of a step's kernels."""
    found = []
    for launch in launches(step):
        found += [line[10:-5] for line in launch.kernel.source.text.splitlines()[-2:] if line.startswith("#include")]
    return found


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (conv_step((2, 64, 9, 9), (32, 64, 1, 1)), ["gemm_mma"]),
        (conv_step((1, 4, 1, 1), (96, 4, 1, 1)), ["gemm_mma"]),
        (conv_step((128, 20, 1, 1), (480, 20, 1, 1)), ["gemm_mma"]),
        (conv_step((2, 64, 9), (32, 64, 1)), ["gemm_mma"]),
        (conv_step((2, 64, 5, 9, 9), (32, 64, 1, 1, 1)), ["gemm_mma"]),
        (conv_step((2, 64, 9, 9), (64, 32, 1, 1), transposed=True), ["gemm_mma"]),
        (conv_step((2, 64, 9, 9), (32, 64, 1, 1), known=False), ["gemm_mma"]),
        (conv_step((2, 64, 9, 9), (32, 64, 1, 1), strides=2), ["conv_mma"]),
        (conv_step((2, 64, 9, 9), (32, 64, 3, 3)), ["conv_mma"]),
        (conv_step((2, 64, 9, 9), (32, 64, 3, 3), DType.BF16), ["conv_mma"]),
        (conv_step((2, 64, 9, 9), (32, 64, 3, 3), F32), ["conv_mma"]),
        (conv_step((2, 64, 9, 9), (32, 64, 3, 3), F64), ["conv_simt"]),
        (conv_step((2, 64, 9, 9), (32, 64, 3, 3), known=False), ["conv_pack", "conv_mma"]),
        (conv_step((2, 64, 9, 9), (64, 32, 2, 2), strides=2, transposed=True), ["conv_mma"]),
        (conv_step((2, 64, 9, 9), (64, 32, 2, 2), strides=2, transposed=True, known=False), ["conv_pack", "conv_mma"]),
        (conv_step((2, 3, 9, 9), (32, 3, 3, 3)), ["conv_stem"]),
        (conv_step((2, 3, 9), (32, 3, 3), DType.BF16), ["conv_stem"]),
        (conv_step((2, 3, 9, 9), (32, 3, 3, 3), F32), ["conv_direct"]),
        (conv_step((2, 3, 9, 9, 9), (32, 3, 3, 3, 3)), ["conv_mma"]),
        (conv_step((2, 3, 9, 9), (32, 3, 3, 3), known=False), ["conv_pack", "conv_mma"]),
        (conv_step((2, 3, 64, 64), (768, 3, 16, 16), strides=16), ["pointwise", "gemm_mma"]),
        (conv_step((2, 64, 64, 64), (768, 64, 16, 16), strides=16), ["conv_mma"]),
        (conv_step((2, 100, 9, 9), (64, 100, 1, 1)), ["conv_mma"]),
        (conv_step((2, 3, 9, 9, 9), (3, 1, 3, 3, 3), groups=3), ["conv_simt"]),
        (conv_step((2, 64, 9, 9), (64, 1, 3, 3), groups=64), ["depthwise_mma"]),
        (conv_step((2, 64, 9), (64, 1, 3), groups=64), ["depthwise_mma"]),
        (conv_step((2, 64, 9, 9), (64, 1, 3, 3), F32, groups=64), ["depthwise"]),
        (conv_step((2, 64, 40), (64, 1, 31), groups=64), ["conv_simt"]),
        (conv_step((2, 63, 9, 9), (63, 1, 3, 3), groups=63), ["conv_simt"]),
        (conv_step((2, 64, 9, 9), (128, 1, 3, 3), groups=64), ["conv_simt"]),
        (conv_step((2, 64, 9, 9), (64, 1, 4, 4), strides=2, groups=64, transposed=True), ["conv_simt"]),
        (conv_step((2, 128, 9, 9), (128, 32, 3, 3), groups=4), ["conv_mma"]),
        (conv_step((2, 128, 9, 9), (128, 4, 3, 3), groups=32), ["conv_simt"]),
        (conv_step((0, 64, 9, 9), (32, 64, 3, 3)), []),
    ],
    ids=lambda value: " ".join(value) or "none" if isinstance(value, list) else "",
)  # fmt: skip
def test_the_kernel_follows_the_shape(step: Step, expected: list[str]) -> None:
    assert kernels(step) == expected


@pytest.mark.parametrize("dtype", [F16, DType.BF16, F32])
def test_a_strided_pointwise_convolution_reads_vectors(dtype: DType) -> None:
    for step in (
        conv_step((2, 64, 9, 9), (32, 64, 1, 1), dtype, strides=2),
        conv_step((2, 64, 9, 9), (32, 64, 1, 1), dtype, pad=1),
    ):
        (launch,) = launches(step)
        assert "constexpr bool x_vector = 1;" in launch.kernel.source.text


def test_first_layers_and_depthwise_ones_have_their_kernels_on_every_architecture() -> None:
    """Filters of known networks, where shared memory is large and where it is small."""
    stems = ((2, 64, 7), (2, 32, 3), (1, 64, 3), (4, 96, 4), (4, 64, 11))  # stride, channels, kernel
    for architecture, batch in product(ARCHITECTURES.values(), (1, 128)):
        context = Context(architecture, 100, WeightStore())
        for strides, n, kernel in stems:
            step = conv_step((batch, 3, 224, 224), (n, 3, kernel, kernel), strides=strides, pad=kernel // 2)
            assert is_stem(step, Geometry(step), context), (architecture, batch, n, kernel)
        for channels, size, kernel, strides in ((96, 112, 3, 2), (144, 56, 3, 1), (672, 14, 5, 2), (1152, 7, 7, 1)):
            x, w = (batch, channels, size, size), (channels, 1, kernel, kernel)
            step = conv_step(x, w, strides=strides, groups=channels, pad=kernel // 2)
            assert is_depthwise_product(step, Geometry(step), context), (architecture, batch, channels)


def test_fp32_is_rounded_only_where_the_context_says_so() -> None:
    step = conv_step((2, 64, 9, 9), (32, 64, 3, 3), F32)
    for tf32 in (False, True):
        (launch,) = launches(step, tf32)
        assert f"constexpr bool exact = {int(not tf32)};" in launch.kernel.source.text


def test_one_kernel_serves_every_image_size_kernel_and_stride() -> None:
    found = set()
    for size, kernel, strides, pad in ((56, 3, 1, 1), (57, 3, 2, 1), (9, 5, 1, 0), (30, 2, 3, 2)):
        step, context = conv_step((4, 64, size, size), (64, 64, kernel, kernel), strides=strides, pad=pad), CONTEXT
        geometry = Geometry(step)
        filters, _ = filters_of(step, geometry, context)
        found.add(launch_conv(step, geometry, filters, MMA_TILES[0], context).kernel)
    assert len(found) == 1


def test_deep_layers_of_one_image_split_their_sums() -> None:
    (launch,) = launches(conv_step((1, 512, 7, 7), (512, 512, 3, 3), pad=1))
    assert launch.grid[2] > 1
    (launch,) = launches(conv_step((32, 64, 56, 56), (64, 64, 3, 3), pad=1))
    assert launch.grid[2] == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_a_step_has_one_workspace(transposed: bool) -> None:
    """Packed filters and the partial sums of a split would be given one place."""
    step = conv_step((1, 512, 7, 7), (512, 512, 3, 3), pad=1, transposed=transposed, known=False)
    pointers = [a for launch in launches(step) for _, a in launch.arguments if isinstance(a, Pointer)]
    assert len({id(p.buffer) for p in pointers if p.buffer.kind is BufferKind.WORKSPACE}) == 1


def test_phases_are_the_transposed_convolution() -> None:
    """Every (output, input, tap) of the definition is in exactly one phase."""
    rng = rng_of("phases")
    for _ in range(200):
        shape = random_shape(rng, 1, 1, 2, 3, transposed=True, kernels=7)
        step = make_step(replace(shape.op, stores=(cv.stored(ACC),)), [(F16, shape.x), weight(*shape.w)])
        geometry, op = Geometry(step), shape.op
        size, out, kernel = shape.x[2], step.outputs[0].shape[2], shape.w[2]
        wanted = sorted(
            (i * op.strides[0] + k * op.dilations[0] - op.pads[0][0], i, k)
            for i, k in product(range(size), range(kernel))
            if 0 <= i * op.strides[0] + k * op.dilations[0] - op.pads[0][0] < out
        )
        found = []
        for phase in geometry.phases:
            along = phase.axes[-1]
            for t, (j, tap) in product(range(along.out), enumerate(along.taps)):
                i = t - along.pad + j * geometry.dilations[-1]
                if 0 <= i < size:
                    found.append((along.start + t * op.strides[0], i, tap))
        assert sorted(found) == wanted
        outputs = [p.axes[-1].start + t * op.strides[0] for p in geometry.phases for t in range(p.axes[-1].out)]
        assert sorted(outputs) == list(range(out))


def test_weight_layouts() -> None:
    w = np.random.default_rng(0).standard_normal((6, 3, 2, 2)).astype(np.float16)
    forward = Geometry(make_step(Conv((1, 1), ((0, 0),) * 2, (1, 1), 2), [(F16, (1, 6, 4, 4)), w]))
    packed = pack_filter(w, forward, 8).reshape(6, 16)
    assert np.array_equal(packed[4, :12].reshape(2, 2, 3), w[4].transpose(1, 2, 0))
    assert not packed[:, 12:].any()
    assert np.array_equal(pack_taps(w, 2, False, F32)[0, 1, 0, 2], w[:, 2, 1, 0].astype(np.float32))
    # Transposed: [group · c, n, …]; stride 1 is one phase with its taps from the last to the first.
    back = Geometry(make_step(Conv((1, 1), ((0, 0),) * 2, (1, 1), 2, True), [(F16, (1, 6, 4, 4)), w]))
    packed = pack_filter(w, back, 8).reshape(2, 3, 16)
    assert np.array_equal(packed[1, 2, :12].reshape(2, 2, 3), w[3:, 2, ::-1, ::-1].transpose(1, 2, 0))
    assert np.array_equal(pack_taps(w, 2, True, F32)[0, 1, 0, 2], w[2::3, :, 1, 0].reshape(-1).astype(np.float32))


@pytest.mark.parametrize(("channels", "kernel", "stride"), [(672, 5, 2), (672, 5, 1), (480, 3, 1), (16000, 3, 1)])
def test_blocks_that_take_several_tiles_are_resident_at_once(channels: int, kernel: int, stride: int) -> None:
    """A few blocks more than fit would wait for all others to end."""
    context, pad = Context(SM_90A, 132, WeightStore()), kernel // 2
    step = conv_step((128, channels, 14, 14), (channels, 1, kernel, kernel), strides=stride, pad=pad, groups=channels)
    geometry = Geometry(step)
    window = window_of(geometry)
    for tile in candidates(window, SM_90A.shared_bytes):
        if tile.stages == 1:
            continue
        across, down, _ = launch_depthwise_product(step, geometry, context, tile).grid
        assert across * down <= max(across, 132 * window.blocks)
        assert down <= tile.count(window)


def test_blocks_of_a_wide_stem_are_resident_at_once() -> None:
    context = Context(SM_90A, 132, WeightStore())
    step = conv_step((128, 3, 64, 64), (200, 3, 3, 3), pad=1)
    across, slabs, _ = launch_stem(step, Geometry(step), context, StemTile(8, 8, 8, 4)).grid
    assert slabs == 4
    assert 132 < across * slabs <= 132 * 4
