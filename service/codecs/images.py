"""Image files → model input. Pillow decodes; limits are checked on the header, before any pixel is decoded.

Called on the preprocessing threads. The geometry is that of torchvision's usual evaluation transform: resize of the
shorter side, centre crop, then (value - mean) / std on 0-255 values.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from service.codecs.pillow_memory import rgb_pixels
from service.errors import InvalidRequest, TooLarge
from service.model_config import ImagesConfig, Interpolation, Layout
from service.workers.resampling import resize

FORMATS = ("JPEG", "PNG", "WEBP")

_FILTERS = {
    Interpolation.NEAREST: Image.Resampling.NEAREST,
    Interpolation.BILINEAR: Image.Resampling.BILINEAR,
    Interpolation.BICUBIC: Image.Resampling.BICUBIC,
    Interpolation.LANCZOS: Image.Resampling.LANCZOS,
}
_OF_THE_ENGINE = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
_DEFAULT_SIZE = 224
_CROP_FRACTION = 0.875  # 224 of 256: the shorter side before the crop where model.toml names none

# A JPEG that is decoded at a half, a quarter or an eighth stays so many times as large as it is resized to: what the
# decoder leaves out of a picture is coarser than what a filter does.
_LEAST_REDUCED = 2

# Our own limit on pixels is checked on the header; Pillow's would be a second, global one.
Image.MAX_IMAGE_PIXELS = None


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """How an image becomes a tensor: `height`, `width` of the crop, `resize` of the shorter side."""

    input: str
    height: int
    width: int
    resize: int
    channels: int
    filter: Image.Resampling
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    layout: Layout
    dtype: np.dtype[Any]
    dct_scaling: bool


def image_size(config: ImagesConfig) -> tuple[int, int] | None:
    """(height, width) from model.toml, if it says."""
    return (config.size, config.size) if isinstance(config.size, int) else config.size


def make_image_spec(
    name: str, dtype: np.dtype[Any], shape: tuple[int | str, ...], config: ImagesConfig
) -> ImageSpec | None:
    """The spec for an input of `shape`, if it is one that an image fits: 4-D, 1 or 3 channels. Raises ValueError."""
    if len(shape) != 4 or dtype.kind not in "fu":
        return None
    layout = config.layout or (Layout.NHWC if shape[3] in (1, 3) and shape[1] not in (1, 3) else Layout.NCHW)
    channels, height, width = shape[1:] if layout is Layout.NCHW else (shape[3], shape[1], shape[2])
    if channels not in (1, 3):
        return None
    wanted = image_size(config) or (_DEFAULT_SIZE, _DEFAULT_SIZE)
    for axis, (fixed, size) in {"height": (height, wanted[0]), "width": (width, wanted[1])}.items():
        if isinstance(fixed, int) and config.size is not None and fixed != size:
            raise ValueError(
                f"model.toml: key 'images.size': {size}, but the model's {axis} is {fixed}; correct or remove it"
            )
    height = height if isinstance(height, int) else wanted[0]
    width = width if isinstance(width, int) else wanted[1]
    for key, values in {"mean": config.mean, "std": config.std}.items():
        if len(values) not in (1, channels):
            raise ValueError(f"model.toml: key 'images.{key}' has {len(values)} values; give 1 or {channels}")
    resize = config.resize or round(max(height, width) / _CROP_FRACTION)
    if resize < max(height, width):
        raise ValueError(f"model.toml: key 'images.resize': {resize} is smaller than the crop; raise it or remove it")
    mean, std = np.array(config.mean, np.float32), np.array(config.std, np.float32)
    return ImageSpec(
        name, height, width, resize, channels, _FILTERS[config.interpolation], mean, std, layout, dtype,
        config.dct_scaling,
    )  # fmt: skip


def decode(data: bytes | bytearray, spec: ImageSpec, max_bytes: int, max_pixels: int) -> NDArray[Any]:
    """One image file as (channels, height, width), or (height, width, channels) for NHWC, in the input's dtype.

    Raises TooLarge over a limit and InvalidRequest for anything that is not a whole JPEG, PNG or WebP image.
    """
    if not data:
        raise InvalidRequest("the image is empty; send the bytes of a JPEG, PNG or WebP file")
    if len(data) > max_bytes:
        raise TooLarge(f"the image has {len(data)} bytes; the limit is {max_bytes}; scale it down")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise TooLarge(
                    f"the image has {image.width} x {image.height} pixels; the limit is {max_pixels} in all; "
                    "scale it down"
                )
            if spec.dct_scaling:  # of a JPEG file; other formats know nothing of it
                image.draft(None, (_LEAST_REDUCED * spec.resize,) * 2)
            image.load()
            _turn_upright(image)
            levels = _crop(_to_mode(image, spec.channels), spec)
    except UnidentifiedImageError:
        raise InvalidRequest("this is not a JPEG, PNG or WebP image; send the bytes of one") from None
    except TooLarge:
        raise
    except Exception as error:  # a hostile file makes Pillow's plugins raise nearly anything
        raise InvalidRequest(f"the image cannot be decoded: {str(error)[:200]}; send the whole file") from None
    return _normalise(levels, spec)


def _turn_upright(image: Image.Image) -> None:
    """As its EXIF orientation says, where it lies otherwise; an EXIF block that cannot be read is no reason to refuse
    the picture."""
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)  # else a picture that is upright would be copied


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    """RGB or L. 16-bit grey is scaled, not clipped; transparency lies on white."""
    if image.mode.startswith("I"):
        values = np.asarray(image, np.float32)
        image = Image.fromarray(np.clip(values / 257.0, 0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        colour = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour)
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


def _crop(image: Image.Image, spec: ImageSpec) -> NDArray[np.uint8]:
    """Resize of the shorter side, centre crop at whole pixels: (channels, height, width). Only what the crop shows is
    resampled."""
    scale = min(image.width, image.height) / spec.resize
    left = round((image.width / scale - spec.width) / 2) * scale
    top = round((image.height / scale - spec.height) / 2) * scale
    right, bottom = min(left + spec.width * scale, image.width), min(top + spec.height * scale, image.height)
    box, size = (left, top, right, bottom), (spec.height, spec.width)
    pixels = rgb_pixels(image) if spec.filter in _OF_THE_ENGINE and image.mode == "RGB" else None
    if pixels is not None:
        levels = resize(pixels.address, (pixels.height, pixels.width), box, size, spec.filter.name)
        if levels is not None:
            return levels
    plain = np.asarray(image.resize((spec.width, spec.height), spec.filter, box=box))
    return plain.reshape(*size, spec.channels).transpose(2, 0, 1)


def _normalise(levels: NDArray[np.uint8], spec: ImageSpec) -> NDArray[Any]:
    """(value - mean) / std in fp32, written once, where it stays; integer inputs get the levels."""
    nhwc = spec.layout is Layout.NHWC
    if spec.dtype.kind != "f":
        return np.ascontiguousarray(levels.transpose(1, 2, 0) if nhwc else levels, spec.dtype)
    shape = (spec.height, spec.width, spec.channels) if nhwc else levels.shape
    out = np.empty(shape, np.float32)
    planes = out.transpose(2, 0, 1) if nhwc else out
    for plane, values, mean, std in zip(planes, levels, *_by_channel(spec), strict=True):
        np.subtract(np.ascontiguousarray(values), mean, out=plane, dtype=np.float32)
        plane /= std
    result: NDArray[Any] = out.astype(spec.dtype, copy=False)
    return result


def _by_channel(spec: ImageSpec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and deviation of each channel."""
    mean, std = (np.broadcast_to(values, spec.channels) for values in (spec.mean, spec.std))
    return mean, std
