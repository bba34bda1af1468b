"""What a reshape does to axes: which old ones become which new ones, and what that makes of an order in memory.

For the passes, whose sizes may be symbols, and for the plan.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.ir.dim import Dim, mod

Order = tuple[int, ...]
Group = tuple[range, range]


def axis_groups(before: Sequence[Dim], after: Sequence[Dim]) -> list[Group] | None:
    """The smallest runs of axes with equal numbers of elements: (old axes, new axes), in order. None where the sizes do
    not show them. Axes of size 1 that are left over make groups with an empty side."""
    if 0 in before or 0 in after:
        return None
    groups: list[Group] = []
    i = j = 0
    while i < len(before) or j < len(after):
        first_i, first_j = i, j
        inner: Dim = 1
        outer: Dim = 1
        while True:
            if i < len(before) and (i == first_i or (j > first_j and inner != outer and mod(outer, inner) == 0)):
                inner, i = inner * before[i], i + 1
            elif j < len(after) and (j == first_j or (inner != outer and mod(inner, outer) == 0)):
                outer, j = outer * after[j], j + 1
            else:
                break
        if inner != outer:
            return None
        groups.append((range(first_i, i), range(first_j, j)))
    return groups


def reshaped_order(before: Sequence[Dim], after: Sequence[Dim], order: Order) -> Order | None:
    """The order of the new axes when a tensor that lies in `order` is reshaped: groups stay where their innermost axis
    is. Where the axes of a group do not follow each other in memory this is what a copy on the way is to make."""
    groups = axis_groups(before, after)
    if groups is None:
        return None
    place = {axis: position for position, axis in enumerate(order)}
    # A group without elements to place (all ones) goes first: where it lies makes no difference.
    ranked = sorted(groups, key=lambda group: max((place[a] for a in group[0] if before[a] != 1), default=-1))
    return tuple(axis for _, new in ranked for axis in new)


def is_view(before: Sequence[Dim], after: Sequence[Dim], order: Order) -> bool:
    """Whether a dense tensor that lies in `order` can be reshaped without a copy."""
    groups = axis_groups(before, after)
    if groups is None:
        return False
    place = {axis: i for i, axis in enumerate(a for a in order if before[a] != 1)}
    runs = ([place[axis] for axis in old if axis in place] for old, _ in groups)
    return all(run == list(range(run[0], run[0] + len(run))) for run in runs if run)
