"""Contenders that take turns, so that what else the machine does hits all of them, and how they compare."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from operator import attrgetter
from statistics import median
from typing import TypeVar

T = TypeVar("T")


def in_turn(contenders: Collection[T], turns: int) -> Iterator[T]:
    """Each of them so many times, every other time in the opposite order."""
    for number in range(turns):
        yield from list(contenders)[:: -1 if number % 2 else 1]


def ratio_of_turns(ours: Sequence[T], others: Sequence[T], read: Callable[[T], float] = attrgetter("rate")) -> float:
    """The median over the turns of what is read of ours over that of the others' in the same turn."""
    return median(read(one) / read(other) for one, other in zip(ours, others, strict=True))
