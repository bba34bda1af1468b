"""The engine's way of resizing photos, for the codec of images: several times as fast as Pillow's, and the same to the
bit. Called on the preprocessing threads, whose first photo imports the engine where it lives in another process."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

Box = tuple[float, float, float, float]
Resize = Callable[[int, tuple[int, int], Box, tuple[int, int], Any], NDArray[np.uint8] | None]


def resize(
    address: int, size: tuple[int, int], box: Box, output: tuple[int, int], filter_: str
) -> NDArray[np.uint8] | None:
    """The `box` (left, top, right, bottom) of `size` (height, width) RGB pixels of four bytes at `address`, as
    u8[3, *output]; `filter_` is BILINEAR or BICUBIC. None where Pillow has to do it."""
    found = _engine_resize()
    if found is None:
        return None
    function, filters = found
    return function(address, size, box, output, filters[filter_])


@cache
def _engine_resize() -> tuple[Resize, Any] | None:
    """The engine's function and its filters; None, with a warning, where the system lets no program make code."""
    from engine import DeviceError, images

    tiny = np.zeros((64, 64, 4), np.uint8)
    try:  # this compiles its kernels
        images.resize(tiny.ctypes.data, (64, 64), (0.0, 0.0, 64.0, 64.0), (32, 32), images.Filter.BICUBIC)
    except DeviceError as error:
        log.warning("photos are resized by Pillow, which takes longer: %s", error)
        return None
    return images.resize, images.Filter
