"""Image preprocessing against Pillow, which takes the same way: two passes, 8 bits in between, in the same order."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import pytest

pytest.importorskip("PIL.Image")
from PIL import Image

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Pointwise
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda.image import Box, Filter, centre_box, launch_images
from tests.engine.targets.cuda.harness import Runner

needs_13 = pytest.mark.skipif(int(version("pillow").split(".")[0]) < 13, reason="Pillow before 13 takes another order")
RESAMPLE = {Filter.BILINEAR: Image.Resampling.BILINEAR, Filter.BICUBIC: Image.Resampling.BICUBIC}
CROP = (24, 28)
SHAPES = [
    (64, 64), (30, 80), (120, 40), (11, 13), (24, 28), (25, 28), (24, 29), (211, 307),
    (400, 12), (900, 3), (3, 900), (12, 400), (1000, 30), (30, 1000), (1, 1), (1, 500), (500, 1), (96, 112), (72, 84),
]  # fmt: skip
"""Height and width: shrunk, grown and both at once, tall and narrow, wide and flat, whole factors (many halves)."""


def photo(rng: np.random.Generator, height: int, width: int, channels: int) -> np.ndarray:
    """A picture with large and small features, and pixels at both ends of the range."""
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.int64) + rng.integers(-90, 90, (height, width, 3))
    return np.ascontiguousarray(np.clip(noisy, 0, 255).astype(np.uint8)[:, :, :channels])


def levels(
    runner: Runner,
    photos: list[np.ndarray],
    boxes: list[Box],
    crop: tuple[int, int],
    filter_: Filter,
    channels_last: bool = False,
    dtype: DType = DType.F32,
) -> np.ndarray:
    """What the kernel makes of photos, as levels again: [images, height, width, channels]."""
    channels = photos[0].shape[2]
    mean, std = np.array([120.0, 110.0, 100.0][:channels]), np.array([60.0, 61.0, 62.0][:channels])
    shape = (len(photos), channels, *crop)
    memory = np.concatenate([one.reshape(-1) for one in photos])
    pixels = Tensor(Buffer("pixels", BufferKind.INPUT, memory.nbytes), DType.U8, memory.shape, (1,))
    out = Buffer("out", BufferKind.OUTPUT, int(np.prod(shape)) * dtype.itemsize)
    result = Tensor(out, dtype, shape, row_major(shape, (0, 2, 3, 1) if channels_last else None))
    launch = launch_images(pixels.buffer, boxes, result, mean.tolist(), std.tolist(), filter_)
    problem = runner.prepare(launch.kernel)
    assert problem is None, problem
    op = Pointwise((ex.Arg(0, DType.U8),))
    (got,) = runner.run(Step("image", op, (pixels,), (result,), op.cost((pixels,), (pixels,))), [launch], [memory])
    return got.astype(np.float64).transpose(0, 2, 3, 1) * std + mean


def pillow(one: np.ndarray, box: Box, crop: tuple[int, int], filter_: Filter) -> np.ndarray:
    image = Image.fromarray(one if one.shape[2] == 3 else one[:, :, 0])
    edges = (box.left, box.top, box.right, box.bottom)
    return np.asarray(image.resize(crop[::-1], RESAMPLE[filter_], box=edges), np.float64).reshape(*crop, -1)


def compare(
    got: np.ndarray, photos: list[np.ndarray], boxes: list[Box], crop: tuple[int, int], filter_: Filter
) -> None:
    """No level is off by more than one, and few are: only where Pillow's own rounding decides between two."""
    differing = 0
    for i, (one, box) in enumerate(zip(photos, boxes, strict=True)):
        off = np.abs(np.rint(got[i]) - pillow(one, box, crop, filter_))
        assert off.max() <= 1, f"image {i} of {one.shape[:2]}: {off.max()} levels off"
        differing += int(np.count_nonzero(off))
    assert differing <= got.size * 5e-4, f"{differing} of {got.size} levels differ"


def laid_out(photos: list[np.ndarray]) -> list[int]:
    return [int(offset) for offset in np.cumsum([0, *(one.nbytes for one in photos[:-1])])]


@needs_13
@pytest.mark.parametrize("filter_", list(Filter))
@pytest.mark.parametrize(("channels", "channels_last"), [(1, False), (3, False), (3, True)])
def test_the_usual_transform_matches_pillow(
    runner: Runner, channels: int, channels_last: bool, filter_: Filter
) -> None:
    rng = np.random.default_rng(channels)
    photos = [photo(rng, *shape, channels) for shape in SHAPES]
    boxes = [centre_box(offset, *one.shape[:2], 32, CROP) for offset, one in zip(laid_out(photos), photos, strict=True)]
    got = levels(runner, photos, boxes, CROP, filter_, channels_last)
    compare(got, photos, boxes, CROP, filter_)


@needs_13
@pytest.mark.parametrize("filter_", list(Filter))
@pytest.mark.parametrize("crop", [(24, 28), (7, 40), (64, 5)])
def test_any_box_matches_pillow(runner: Runner, crop: tuple[int, int], filter_: Filter) -> None:
    """Also where one side grows and the other shrinks: the order of the passes hangs on the sizes of both."""
    rng = np.random.default_rng(crop[0])
    photos = [photo(rng, *shape, 3) for shape in SHAPES]
    boxes = []
    for offset, one in zip(laid_out(photos), photos, strict=True):
        height, width = one.shape[:2]
        top, left = rng.uniform(0, height / 3), rng.uniform(0, width / 3)
        bottom, right = rng.uniform(top + height / 3, height), rng.uniform(left + width / 3, width)
        boxes.append(Box(offset, height, width, float(top), float(left), float(bottom), float(right)))
    compare(levels(runner, photos, boxes, crop, filter_), photos, boxes, crop, filter_)


@needs_13
@pytest.mark.parametrize("excess", [0, 1])
def test_the_order_changes_where_pillow_changes_it(runner: Runner, excess: int) -> None:
    """Height 24 + 2 · (60 − 28) is the last that Pillow begins along the rows: the wrong order shows in many levels."""
    one = photo(np.random.default_rng(7), 24 + 2 * (60 - 28) + excess, 60, 3)
    box = Box(0, *one.shape[:2], 0.0, 0.0, float(one.shape[0]), 60.0)
    got = levels(runner, [one], [box], CROP, Filter.BILINEAR)
    compare(got, [one], [box], CROP, Filter.BILINEAR)
    across, down = Box(0, *one.shape[:2], 0, 0, one.shape[0], 60), (CROP[0], 60)
    first = pillow(one, across, down if not excess else (one.shape[0], CROP[1]), Filter.BILINEAR).astype(np.uint8)
    other = pillow(first, Box(0, *first.shape[:2], 0, 0, *first.shape[:2]), CROP, Filter.BILINEAR)
    assert np.count_nonzero(np.rint(got[0]) != other) > got.size * 0.02


@needs_13
def test_half_precision_output_matches_to_its_rounding(runner: Runner) -> None:
    one = photo(np.random.default_rng(3), 90, 70, 3)
    box = centre_box(0, 90, 70, 32, CROP)
    got = levels(runner, [one], [box], CROP, Filter.BICUBIC, True, DType.F16)
    assert np.abs(got[0] - pillow(one, box, CROP, Filter.BICUBIC)).max() <= 1 + 60 * 3 * 2.0**-11


def test_a_box_outside_its_image_is_refused() -> None:
    output = Tensor(Buffer("out", BufferKind.OUTPUT, 4 * 3 * 16), DType.F32, (1, 3, 4, 4), row_major((1, 3, 4, 4)))
    pixels = Buffer("pixels", BufferKind.INPUT, 3 * 100)
    for edges in ((-1.0, 0.0, 5.0, 5.0), (0.0, 0.0, 10.5, 5.0), (4.0, 0.0, 4.0, 5.0)):
        with pytest.raises(ShapeError, match="box of image 0"):
            launch_images(pixels, [Box(0, 10, 10, *edges)], output, (0, 0, 0), (1, 1, 1))
    with pytest.raises(ShapeError, match="does not lie in the buffer"):
        launch_images(pixels, [Box(1, 10, 10, 0, 0, 5, 5)], output, (0, 0, 0), (1, 1, 1))
