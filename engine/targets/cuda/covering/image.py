"""The covering set's image preprocessing."""

from __future__ import annotations

from collections.abc import Iterator

from engine.plan.tensor import Buffer, BufferKind
from engine.targets.cuda.conv_geometry import channels_last
from engine.targets.cuda.covering.build import (
    F16,
    F32,
    fresh,
)
from engine.targets.cuda.image import Filter, centre_box, launch_images
from engine.targets.cuda.kernel import Launch


def images() -> Iterator[tuple[str, Launch]]:
    """Image preprocessing for every filter, in both layouts and types."""
    pixels = Buffer("pixels", BufferKind.INPUT, 300 * 400 * 3)
    for filter_, dtype in zip(Filter, (F16, F32), strict=True):
        output = fresh("output0", BufferKind.OUTPUT, dtype, (1, 3, 224, 224), channels_last(4))
        box = centre_box(0, 300, 400, 256, (224, 224))
        yield f"image {filter_.name.lower()}", launch_images(pixels, [box], output, (0, 0, 0), (1, 1, 1), filter_)
