"""Image preprocessing on the GPU against Pillow. Needs a GPU."""

# ruff: noqa: E402  (what needs the CUDA packages is imported after the skip)

from __future__ import annotations

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")
Image = pytest.importorskip("PIL.Image")

from engine.ir.dtype import DType
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda.device import Device
from engine.targets.cuda.image import Filter, centre_box, launch_images
from engine.targets.cuda.kernel import Pointer, pack

pytestmark = pytest.mark.gpu
LEVELS = 1.01  # Pillow's weights are fixed-point: a value halfway between levels may fall on the other side
CROP = (56, 60)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("filter_", list(Filter))
@pytest.mark.parametrize("channels_last", [False, True])
def test_preprocessing_matches_pillow(channels: int, filter_: Filter, channels_last: bool) -> None:
    rng = np.random.default_rng(channels)
    sizes = [(64, 64), (70, 200), (300, 90), (480, 640), (57, 61), (1000, 1333)]
    photos = [_smooth(rng, *size, channels) for size in sizes]
    offsets = np.cumsum([0, *(photo.nbytes for photo in photos)])
    boxes = [centre_box(int(o), *p.shape[:2], 64, CROP) for o, p in zip(offsets, photos, strict=False)]
    mean, std = ([120.0, 110.0, 100.0][:channels], [60.0, 61.0, 62.0][:channels])
    shape = (len(photos), channels, *CROP)
    out_buffer = Buffer("out", BufferKind.OUTPUT, int(np.prod(shape)) * 4)
    output = Tensor(out_buffer, DType.F32, shape, row_major(shape, (0, 2, 3, 1) if channels_last else None))
    pixels = Buffer("pixels", BufferKind.INPUT, int(offsets[-1]))
    launch = launch_images(pixels, boxes, output, mean, std, filter_)

    device = Device(0)
    device.load([launch.kernel])
    memory = {id(pixels): cupy.asarray(np.concatenate([photo.reshape(-1) for photo in photos]))}
    result = cupy.full(int(np.prod(shape)), np.nan, np.float32)
    memory[id(out_buffer)] = result

    def address(pointer: Pointer) -> int:
        if id(pointer.buffer) not in memory:
            memory[id(pointer.buffer)] = cupy.asarray(pointer.buffer.data)
        return int(memory[id(pointer.buffer)].data.ptr) + pointer.offset

    cupy.cuda.get_current_stream().synchronize()  # on which the operands were made; the launch is on another
    device.launch(launch.kernel, launch.grid, pack(launch.arguments, address, lambda _: b"", 0), device.stream, False)
    device.stream.synchronize()
    strides = tuple(stride * 4 for stride in output.strides)
    got = np.lib.stride_tricks.as_strided(result.get(), shape, strides)
    for i, (photo, box) in enumerate(zip(photos, boxes, strict=True)):
        image = Image.fromarray(photo if channels == 3 else photo[:, :, 0])
        resample = Image.Resampling.BILINEAR if filter_ is Filter.BILINEAR else Image.Resampling.BICUBIC
        edges = (box.left, box.top, box.left + box.box_width, box.top + box.box_height)
        want = np.asarray(image.resize(CROP[::-1], resample, box=edges), np.float64).reshape(*CROP, channels)
        levels = got[i].transpose(1, 2, 0) * np.array(std) + np.array(mean)
        assert np.abs(levels - want).max() <= LEVELS, f"image {i} of {photo.shape}"


def _smooth(rng: np.random.Generator, height: int, width: int, channels: int) -> np.ndarray:
    """A picture with large and small features."""
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.int64) + rng.integers(-40, 40, (height, width, 3))
    return np.ascontiguousarray(np.clip(noisy, 0, 255).astype(np.uint8)[:, :, :channels])
