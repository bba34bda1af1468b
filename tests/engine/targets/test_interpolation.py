"""Which axes of a resize need a table."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ir.ops import Resize, ResizeMode
from engine.targets.interpolation import tables_of


def resize(scale: float | None, mode: ResizeMode = ResizeMode.LINEAR, coordinates: str = "asymmetric") -> Resize:
    return Resize((2,), (scale,), mode, coordinates)


@pytest.mark.parametrize("mode", ResizeMode)
def test_an_axis_that_is_copied_needs_none(mode: ResizeMode) -> None:
    assert tables_of(resize(1.0, mode), (2,), (2,)) == {}


def test_a_scale_that_keeps_the_size_still_moves_the_coordinates() -> None:
    """⌊2 · 1.44⌋ is 2, and result 1 stands at 1 / 1.44 = 0.69 between elements 0 and 1."""
    ((index, weights),) = tables_of(resize(1.44), (2,), (2,)).values()
    assert index.tolist() == [[0, 0], [1, 1]]
    assert np.allclose(weights, [[1, 1 - 1 / 1.44], [0, 1 / 1.44]])
