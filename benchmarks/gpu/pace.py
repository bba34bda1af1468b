"""How long a GPU does a contender's own work before a round of it is timed, and how long the round is. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.plan.plan import Step


@dataclass(frozen=True)
class Pace:
    """Milliseconds of a contender's own work before a round, with no gap between, and of the round."""

    warm_ms: float
    round_ms: float


COOL = Pace(warm_ms=5, round_ms=3)
HOT = Pace(warm_ms=80, round_ms=10)
"""Of what keeps the tensor cores so busy that the chip comes to its power limit. An H100 answers to the power that it
draws after 30 to 60 ms, so until then the clock is what the contender before has left: the convolution 256→256@56 at
batch 32 takes 165 µs behind PyTorch's operators, 191 behind cuDNN's kernel, 180 from 80 ms on (docs/performance.md)."""
_HOT_FLOPS = 200e12  # FLOP/s
_FLOPS, _BYTES, _AROUND = 800e12, 3e12, 5e-6  # an H100's rates a second in round numbers; launch, first loads and end


def pace_of(steps: Iterable[Step]) -> Pace:
    """The pace for all contenders of a case: by the rate in FLOP/s that its steps should reach on an H100."""
    costs = [step.cost for step in steps]
    seconds = sum(max(cost.flops / _FLOPS, cost.bytes / _BYTES) for cost in costs) + _AROUND
    return HOT if sum(cost.flops for cost in costs) >= _HOT_FLOPS * seconds else COOL
