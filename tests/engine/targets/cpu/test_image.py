"""Resizing of photos against Pillow, which it equals to the bit, on every instruction set of this machine."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("PIL.Image")
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.images import Box, Filter, resize
from engine.targets.cpu.codegen.isa import ISA_VARIABLE, host_isas

RESAMPLE = {Filter.BILINEAR: Image.Resampling.BILINEAR, Filter.BICUBIC: Image.Resampling.BICUBIC}
GUARD = 4096
"""Bytes before and behind a picture that nothing may be read into a result from."""


def photo(seed: int, height: int, width: int) -> np.ndarray:
    """Noise with whole stretches at both ends of the range, where sums are cut off."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (height, width, 3), np.uint8)
    edges = np.where(rng.integers(0, 2, (height, width, 1)) > 0, 255, 0).astype(np.uint8)
    return np.where(np.arange(width)[None, :, None] % 40 < 20, noise, edges)


def resized(pixels: np.ndarray, box: Box, output: tuple[int, int], filter_: Filter, fill: int) -> np.ndarray | None:
    """What the kernels make of a picture amid other memory; the fourth byte of its pixels is `fill`, too."""
    height, width, _ = pixels.shape
    memory = np.full(2 * GUARD + height * width * 4, fill, np.uint8)
    memory[GUARD:-GUARD].reshape(height, width, 4)[:, :, :3] = pixels
    return resize(memory.ctypes.data + GUARD, (height, width), box, output, filter_)


def check(pixels: np.ndarray, box: Box, output: tuple[int, int], filter_: Filter) -> bool:
    """Whether the kernels take it; where they do, all of it is right."""
    found = resized(pixels, box, output, filter_, 0)
    if found is None:
        return False
    expected = np.asarray(Image.fromarray(pixels).resize(output[::-1], RESAMPLE[filter_], box=box))
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))
    np.testing.assert_array_equal(found, resized(pixels, box, output, filter_, 255))
    return True


@pytest.mark.parametrize("isa", list(host_isas()))
@pytest.mark.parametrize("filter_", list(Filter))
def test_every_instruction_set_gives_pillows_bits(isa: str, filter_: Filter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, isa)
    for height, width, output in (
        (480, 640, (224, 224)), (64, 64, (64, 64)), (31, 33, (60, 65)), (97, 301, (48, 17)), (301, 297, (50, 16)),
    ):  # fmt: skip
        whole = (0.0, 0.0, float(width), float(height))
        inner = (width * 0.125, height * 0.3, width * 0.875, height * 0.9)
        for box in (whole, inner):
            assert check(photo(1, height, width), box, output, filter_)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_sizes_and_boxes_give_pillows_bits(data: st.DataObject) -> None:
    height, width = (data.draw(st.integers(1, 260)) for _ in range(2))
    output = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80))
    edges = []
    for size in (width, height):
        begin = data.draw(st.floats(0, size - 0.5))
        edges.append((begin, data.draw(st.floats(begin + 0.25, size, exclude_min=True))))
    box = (edges[0][0], edges[1][0], edges[0][1], edges[1][1])
    check(photo(2, height, width), box, output, data.draw(st.sampled_from(Filter)))


@pytest.mark.parametrize(
    ("height", "width", "output"),
    [(100, 12, (50, 16)), (100, 100, (50, 15)), (3, 100, (3, 50)), (900, 100, (64, 64))],
    ids=["window longer than a row", "narrow output", "few rows", "columns first"],
)
def test_what_the_kernels_do_not_take_is_left_to_pillow(height: int, width: int, output: tuple[int, int]) -> None:
    box = (0.0, 0.0, float(width), float(height))
    assert resized(photo(3, height, width), box, output, Filter.BICUBIC, 0) is None
