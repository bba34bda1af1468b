"""What a reshape makes of axes and of their order in memory."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ir.dim import symbol
from engine.ir.regroup import axis_groups, is_view, reshaped_order

N, H = symbol("n"), symbol("h")


def test_axes_are_grouped_where_their_sizes_agree() -> None:
    assert axis_groups((N, 8, H), (N, 2, 4, H)) == [(range(1), range(1)), (range(1, 2), range(1, 3)),
                                                    (range(2, 3), range(3, 4))]  # fmt: skip
    assert axis_groups((N, 8), (4, N, 2)) is None
    assert axis_groups((0, 3), (0, 5)) is None


def test_an_order_is_followed_through_a_split_and_a_merge() -> None:
    last, split = (0, 2, 3, 1), (0, 3, 4, 1, 2)
    assert reshaped_order((N, 8, H, H), (N, 2, 4, H, H), last) == split
    assert reshaped_order((N, 2, 4, H, H), (N, 8, H, H), split) == last


@pytest.mark.parametrize("seed", range(20))
def test_is_view_agrees_with_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before = (2, 3, 4, 1, 2)
    after = [(6, 4, 2), (2, 12, 2), (2, 3, 2, 2, 2), (24, 2), (2, 3, 8)][seed % 5]
    order = tuple(int(axis) for axis in rng.permutation(5))
    array = np.zeros([before[axis] for axis in order]).transpose(np.argsort(order))
    viewed = np.shares_memory(array, array.reshape(after))
    assert is_view(before, after, order) == viewed
