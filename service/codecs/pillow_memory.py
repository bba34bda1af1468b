"""Where Pillow keeps the pixels of a picture: through the Arrow interface, which hands them out without a copy."""

import ctypes
from dataclasses import dataclass

from PIL import Image

# Rows of one picture lie in one block up to this size, in bytes; what is larger has no single address. Pillow's default
# is less than 4 million pixels, and a block is never made larger than its picture.
_BLOCK_BYTES = 1 << 30
_PIXEL_BYTES = 4  # of RGB in Pillow

Image.core.set_block_size(_BLOCK_BYTES)  # type: ignore[attr-defined]  # what PILLOW_BLOCK_SIZE sets

_pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_in.restype, _pointer_in.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class _ArrowArray(ctypes.Structure):
    """The beginning of `struct ArrowArray`."""

    _fields_ = (
        ("length", ctypes.c_int64),
        ("null_count", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("n_buffers", ctypes.c_int64),
        ("n_children", ctypes.c_int64),
        ("buffers", ctypes.POINTER(ctypes.c_void_p)),
        ("children", ctypes.POINTER(ctypes.c_void_p)),
    )


@dataclass(frozen=True, slots=True)
class Pixels:
    """`address` of the first of all pixels of a picture, which lie side by side, as long as this object lives."""

    address: int
    height: int
    width: int
    _owner: object


def rgb_pixels(image: Image.Image) -> Pixels | None:
    """The pixels of a loaded RGB picture, four bytes each; None where they do not lie in one piece."""
    try:
        _, owner = image.__arrow_c_array__()
    except ValueError:
        return None
    array = _ArrowArray.from_address(_pointer_in(owner, b"arrow_array"))
    levels = _ArrowArray.from_address(array.children[0])
    if levels.length != image.width * image.height * _PIXEL_BYTES or levels.offset:
        return None
    return Pixels(levels.buffers[1], image.height, image.width, owner)
