"""Checking, then timing, one case beside its peers. Knows neither devices nor files.

Every contender takes its turn in every round, so that a change of clocks or a neighbour's work meets all of them, and
in another order each time, so that each follows every other one: what ran before decides how much of its power limit a
GPU has used up. A figure is the median of a contender's rounds. Ours is checked first: where it is wrong, nothing is
timed. A peer whose own result is wrong, or which cannot run the case, does not count, and the row says why.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

PEER_TOLERANCE = 1e-2
ROUNDS = 7
_OURS = ""  # no peer's name
_REASON_LENGTH = 160


class Contender(Protocol):
    """One implementation of a case, ready to run on operands of its own."""

    def error(self) -> float:
        """The relative L2 error of a run against the reference, after its results were poisoned."""
        ...

    def round_us(self) -> float:
        """Microseconds per run in one round."""
        ...


@dataclass(frozen=True)
class Entry:
    """A peer by name. `prepare` compiles, captures and so on; whatever it raises means that the peer does not count.

    A `part` computes less than the case does (the product without its bias, say): it is recorded beside the peers and
    takes no part in the ratio.
    """

    name: str
    prepare: Callable[[], Contender]
    part: bool = False


@dataclass(frozen=True)
class Measurement:
    """What came out. Where `failure` says something, ours was wrong or did not run, and there are no times.

    `peers` and `parts` are None where `reasons` says why.
    """

    ours_us: float | None = None
    peers: Mapping[str, float | None] = field(default_factory=dict)
    parts: Mapping[str, float | None] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    rel_err: float | None = None
    failure: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    """By size, where `rel_err` is the worst of several."""

    @property
    def best_peer_us(self) -> float | None:
        return min((us for us in self.peers.values() if us is not None), default=None)

    @property
    def ratio(self) -> float | None:
        """The best peer's time over ours: above 1, ours is faster."""
        best = self.best_peer_us
        return None if best is None or self.ours_us is None else best / self.ours_us


def measure(
    prepare: Callable[[], Contender], entries: Sequence[Entry], tolerance: float, rounds: int = ROUNDS
) -> Measurement:
    """Check ours (what `prepare` makes) and the peers, then time those that are right."""
    try:
        ours = prepare()
        error = ours.error()
        if not error <= tolerance:
            return Measurement(rel_err=error, failure=f"relative error {error:.1e}, above {tolerance:g}")
    except Exception as problem:
        traceback.print_exc()
        return Measurement(failure=reason(problem))
    right: dict[str, Contender] = {_OURS: ours}
    reasons: dict[str, str] = {}
    for entry in entries:
        try:
            right[entry.name] = _checked(entry.prepare())
        except Exception as problem:
            reasons[entry.name] = reason(problem)
    times: dict[str, list[float]] = {name: [] for name in right}
    names = list(right)
    for number in range(rounds):
        for name in (names[turn] for turn in order_of(number, len(names))):
            if name in reasons:
                continue
            try:
                times[name].append(right[name].round_us())
            except Exception as problem:
                if name == _OURS:
                    traceback.print_exc()
                    return Measurement(rel_err=error, failure=reason(problem))
                reasons[name] = reason(problem)
    found = {name: None if name in reasons else round(median(times[name]), 2) for name in (e.name for e in entries)}
    return Measurement(
        round(median(times[_OURS]), 2),
        _of(found, entries, False),
        _of(found, entries, True),
        reasons,
        float(f"{error:.1e}"),
    )


def order_of(number: int, count: int) -> list[int]:
    """The order of `count` contenders in round `number`: over `count` rounds, or twice as many where it is odd, each
    comes equally often in every place and behind every other one (Williams 1949, balanced for residual effects)."""
    ends = [i // 2 + 1 if i % 2 else -(i // 2) for i in range(count)]  # 0, 1, -1, 2, -2, …
    order = [(end + number) % count for end in ends]
    return order[::-1] if count % 2 and number % 2 else order


def _checked(contender: Contender) -> Contender:
    error = contender.error()
    if not error <= PEER_TOLERANCE:
        raise ValueError(f"its own result is off: relative error {error:.1e}")
    return contender


def _of(found: Mapping[str, float | None], entries: Iterable[Entry], part: bool) -> dict[str, float | None]:
    return {entry.name: found[entry.name] for entry in entries if entry.part is part}


def worst(errors: Iterable[float]) -> float:
    """The largest error; not a number where one is none, which `max` passes over behind another."""
    found = list(errors)
    return math.nan if any(map(math.isnan, found)) else max(found)


def reason(problem: Exception) -> str:
    """An exception as one short line."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= _REASON_LENGTH else f"{text[: _REASON_LENGTH - 1]}…"
