"""Photos to a model's input on the GPU (image.cuh): resize, crop, normalise and change the layout in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from engine.errors import ShapeError
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda.kernel import STORAGE, Argument, I64s, Launch, Pointer, ceildiv, launch, pointer_to

_THREADS = 128
_BOX = np.dtype([("offset", "i8"), ("size", "i4", 2), ("box", "f4", 4)])  # ImageBox of image.cuh


class Filter(Enum):
    """Resampling filters, as Pillow defines them."""

    BILINEAR = 0
    BICUBIC = 1


@dataclass(frozen=True)
class Box:
    """One image of `height` × `width` pixels, and the edges (in pixels) of the box in it that becomes the input.

    `offset`: its first byte in the buffer of all images; its rows follow each other without gaps.
    """

    offset: int
    height: int
    width: int
    top: float
    left: float
    bottom: float
    right: float


def centre_box(offset: int, height: int, width: int, resize: int, crop: tuple[int, int]) -> Box:
    """The box of the usual evaluation transform: the shorter side resized to `resize`, then `crop` (height, width) from
    the middle at whole pixels."""
    scale = min(height, width) / resize
    top, left = (round((size / scale - part) / 2) * scale for size, part in zip((height, width), crop, strict=True))
    bottom, right = min(top + crop[0] * scale, height), min(left + crop[1] * scale, width)
    return Box(offset, height, width, top, left, bottom, right)


def launch_images(
    pixels: Buffer,
    boxes: Sequence[Box],
    output: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    filter_: Filter = Filter.BILINEAR,
) -> Launch:
    """Fill `output`, logically [images, channels, height, width] in any layout, with (level − mean) / std.

    `pixels` holds the bytes of all images, interleaved by channel (1 or 3). Raises ShapeError where sizes do not fit.
    """
    images, channels, out_h, out_w = output.shape
    if len(boxes) != images or channels not in (1, 3) or len(mean) != channels or len(std) != channels:
        raise ShapeError(f"{len(boxes)} images with {len(mean)} means for an input of shape {list(output.shape)}")
    for i, box in enumerate(boxes):
        inside = 0 <= box.top < box.bottom <= box.height and 0 <= box.left < box.right <= box.width
        if not inside:
            raise ShapeError(f"the box of image {i} does not lie in its {box.height}×{box.width} pixels")
        if box.offset < 0 or box.offset + box.height * box.width * channels > pixels.nbytes:
            raise ShapeError(
                f"image {i} of {box.height}×{box.width} does not lie in the buffer of {pixels.nbytes} bytes"
            )
    table = np.zeros(images, _BOX)
    for row, box in zip(table, boxes, strict=True):
        row["offset"], row["size"] = box.offset, (box.width, box.height)
        row["box"] = (box.left, box.top, box.right, box.bottom)
    three = [*range(channels), *(channels - 1,) * (3 - channels)]  # unused ones repeat the last
    arguments: dict[str, Argument] = {
        "pixels": Pointer(pixels, ctype="u8"),
        "boxes": Pointer(Buffer("boxes", BufferKind.PLAN, table.nbytes, table.view(np.uint8)), ctype="struct ImageBox"),
        "out": pointer_to(output), "out_stride": I64s(output.strides), "images": images, "out_h": out_h, "out_w": out_w,
        **{f"mean_{i}": float(mean[c]) for i, c in enumerate(three)},
        **{f"scale_{i}": 1.0 / float(std[c]) for i, c in enumerate(three)},
    }  # fmt: skip
    config: dict[str, int | bool | str] = {
        "channels": channels, "filter": filter_.value, "threads": _THREADS, "out_t": STORAGE[output.dtype],
    }  # fmt: skip
    grid = (ceildiv(images * out_h * out_w, _THREADS), 1, 1)
    return launch("image", "image.cuh", config, [], arguments, grid, _THREADS)
