"""``python -m benchmarks packed``: encoders on packed tokens, batches with the lengths of a real corpus, beside the
same network with the same weights in PyTorch: padded, eager and through torch.compile, and on jagged nested tensors.

All sides start from inputs that lie in device memory as they take them and leave their result there as they give it:
ours, a bound model, has padded token ids with the rows that the host has found in the mask, and gives a padded result;
the padded peers have padded ones throughout; the jagged ones nested tensors on either side, which saves them the
unpacking. What the host does for a batch is in the times of `Model.run`. Prepared and timed as `models` is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.cases.packed import PackedCase
from benchmarks.gpu.executables import compile_threads
from benchmarks.gpu.jagged import JaggedBert, jagged, without_waiting
from benchmarks.gpu.models import TOLERANCE, run_us, settle
from benchmarks.gpu.networks import network
from benchmarks.gpu.pace import Pace
from benchmarks.gpu.packed_ours import OurContender, OurModels
from benchmarks.gpu.preparing import Compilations, Network, outcomes, references, told
from benchmarks.gpu.real_tokens import Real
from benchmarks.gpu.references import free
from benchmarks.gpu.timing import CallContender, Check, GraphContender
from benchmarks.measure import Contender, Entry, Measurement, measure
from benchmarks.packed import COMPILE, EAGER, JAGGED, JAGGED_CALLED, JAGGED_COMPILE, figures
from benchmarks.results import Ceilings
from benchmarks.workers import groups

OURS_PADDED = "ours padded"
WORST_TOKEN = 2.0
"""Times the error of the padded graph's worst token, up to which a packed one's may be. Rounding every stored tensor to
fp16 moves all tokens of MiniLM together by 1.4e-3 (1.7e-3 at 512 tokens), which is the relative error of one rounding,
2⁻¹¹ / √3, times the root of the 50 of six layers less what norms take back; but one of 7,539 tokens by 5.8e-3 and one
of 7,928 by 8.0e-3 (packed, in NumPy, nothing else rounded; with probabilities rounded, too, 4.2e-3 and
8.0e-3). Which token that is depends on how each rounding falls out, so kernels that add in another order have another
one: of the same distribution, in which the worst of so many differ by less than two times. A token that reads another
sequence's is off by about 1."""
MOST_OF_A_TOKEN = 2e-2
"""Whatever the padded graph does: more than `WORST_TOKEN` times what rounding to fp16 was found to do."""
_PREPARE_SECONDS = 90.0  # for references and our kernels, where torch.compile takes no part


@dataclass(frozen=True)
class Outcome:
    """A measurement, the floor of the packed plan and `Model.run` on packed tokens in µs, and the row's figures:
    those of `benchmarks.packed.figures`, `worst_token`, the relative error of the real token that is furthest off, and
    `worst_token_padded`, the same of our padded graph, `tokens`, how many are computed, and µs of our padded graph,
    bound (`ours_padded_us`) and in `Model.run` (`run_padded_us`)."""

    measurement: Measurement
    floor_us: float | None = None
    run_us: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


def measure_all(
    cases: Sequence[PackedCase],
    files: Mapping[str, Path],
    ceilings: Ceilings,
    compile_until: float | None,
    deadline: float,
    workers: int,
) -> Iterator[tuple[PackedCase, Outcome]]:
    """Every case with what came out, as long as `deadline` is not past. `files` has the model file of each.

    torch.compile stops at `compile_until`, None: it takes no part. Both are times of `time.monotonic`. `workers`: the
    most processes at once.
    """
    by_name = {case.name: case for case in cases}
    shares = groups([(case.model, case) for case in cases], workers)
    threads = compile_threads(len(shares))
    recipes = [PackedRecipe(tuple(share), files[share[0].model], ceilings, threads, compile_until) for share in shares]
    for name, outcome in outcomes(recipes, threads, _PREPARE_SECONDS, compile_until, deadline):
        yield by_name[name], Outcome(Measurement(failure=outcome)) if isinstance(outcome, str) else outcome


@dataclass(frozen=True)
class PackedRecipe:
    """Some sizes of one model, for a process of its own; `given_up` says why torch.compile is not even tried."""

    cases: tuple[PackedCase, ...]
    path: Path
    ceilings: Ceilings
    threads: int
    compile_until: float | None
    given_up: str = ""

    @property
    def names(self) -> Sequence[str]:
        return [case.name for case in self.cases]

    def build(self) -> PackedBench:
        return PackedBench(self)

    def plain(self) -> PackedRecipe:
        return replace(self, given_up="the process that compiled it crashed, or had to be ended")


class PackedBench:
    """The sizes of one model, ready to be timed."""

    def __init__(self, recipe: PackedRecipe) -> None:
        begin = time.monotonic()
        self._recipe = recipe
        self._cases = {case.name: case for case in recipe.cases}
        settle(recipe.threads)
        expected, self._failures = references(recipe.cases, recipe.path, recipe.threads)
        self._expected = {}
        for name, outputs in expected.items():
            (hidden,) = outputs.values()
            self._expected[name] = Real.of(hidden, self._cases[name].feeds())
        prepared = time.monotonic()
        self._ours = OurModels(recipe.path, recipe.threads)
        for case in recipe.cases:
            self._ours.prepare(case)
        loaded = time.monotonic()
        self._net = network(recipe.cases[0].model, recipe.path)
        assert self._net.module is not None
        self._networks: Mapping[str, Network] = {COMPILE: self._net.call, JAGGED_COMPILE: JaggedBert(self._net.module)}
        self._arguments = {case.name: self._made(case) for case in recipe.cases}
        self._compiled = Compilations(recipe.compile_until or 0.0, recipe.given_up)
        if recipe.compile_until is not None:
            for kind, one in self._networks.items():  # the padded ones first
                for name in self._cases:
                    self._compiled.add(name, kind, one, self._arguments[name][kind])
        free()
        told(list(self._cases), begin, prepared, loaded, len(self._compiled))

    def _made(self, case: PackedCase) -> Mapping[str, tuple[torch.Tensor, ...]]:
        """The arguments of either network."""
        feeds = case.feeds()
        padded = self._net.arguments(feeds)
        return {COMPILE: padded, JAGGED_COMPILE: jagged(feeds, str(padded[0].device))}

    def measure(self, name: str) -> Outcome:
        """Check and time one case."""
        case = self._cases[name]
        floor_us = self._ours.floor(case, self._recipe.ceilings)
        if name in self._failures:
            return Outcome(Measurement(failure=self._failures[name]), floor_us)
        real = self._expected[name]
        made: dict[bool, OurContender] = {}

        def ours(is_packed: bool) -> Contender:
            made[is_packed] = self._ours.contender(case, real, is_packed)
            return made[is_packed]

        entries = [Entry(OURS_PADDED, partial(ours, False), part=True)]
        entries += self._peers(name, real)
        found = measure(partial(ours, True), entries, TOLERANCE)
        said, ours_padded_us = figures(case, found), found.parts.get(OURS_PADDED)
        found = replace(found, parts={})
        if ours_padded_us is not None:
            said["ours_padded_us"] = ours_padded_us
        for is_packed, figure in ((True, "worst_token"), (False, "worst_token_padded")):
            if is_packed in made and math.isfinite(made[is_packed].worst):
                said[figure] = made[is_packed].worst
        if True in made:
            said["tokens"] = self._ours.tokens(case)
            found = judged(found, made[True].worst, None if ours_padded_us is None else said.get("worst_token_padded"))
        free()
        if found.failure:
            return Outcome(found, floor_us, figures=said)
        feeds = case.feeds()
        said["run_padded_us"] = run_us(self._ours.padded, feeds)
        return Outcome(found, floor_us, run_us(self._ours.packed, feeds), said)

    def _peers(self, name: str, real: Real) -> Iterator[Entry]:
        """PyTorch padded, then on jagged tensors: in a CUDA graph as it is, as a user would call it, and compiled."""
        padded, nested = (self._arguments[name][kind] for kind in (COMPILE, JAGGED_COMPILE))
        pace = self._ours.pace(self._cases[name])
        network, on_nested = self._networks[COMPILE], self._networks[JAGGED_COMPILE]
        compiles = self._recipe.compile_until is not None
        yield Entry(EAGER, partial(_in_graph, lambda: network(*padded), real.of_padded, pace))
        if compiles:
            compiled = partial(self._compiled.found, name, COMPILE)
            yield Entry(COMPILE, lambda: _in_graph(partial(compiled(), *padded), real.of_padded, pace))
        yield Entry(JAGGED_CALLED, lambda: CallContender(lambda: on_nested(*nested).values(), real.of_tokens, pace))
        yield Entry(JAGGED, partial(_jagged_in_graph, lambda: on_nested(*nested).values(), real, pace))
        if compiles:
            yield Entry(JAGGED_COMPILE, partial(self._compiled_jagged, name, nested, real, pace))

    def _compiled_jagged(self, name: str, nested: tuple[torch.Tensor, ...], real: Real, pace: Pace) -> Contender:
        compiled = self._compiled.found(name, JAGGED_COMPILE)
        return _jagged_in_graph(lambda: compiled(*nested).values(), real, pace)


def _in_graph(call: Callable[[], torch.Tensor], check: Check, pace: Pace) -> Contender:
    """In a CUDA graph, without the host's part of a call."""
    return GraphContender(lambda _: call(), 1, check, pace)


def _jagged_in_graph(call: Callable[[], torch.Tensor], real: Real, pace: Pace) -> Contender:
    """The same on jagged tensors, whose operators look at lengths. Raises RuntimeError for what cannot be captured."""
    without_waiting(call)
    return _in_graph(call, real.of_tokens, pace)


def judged(found: Measurement, worst: float, padded: float | None) -> Measurement:
    """A failure where one real token is further off than all together may be, and further than `WORST_TOKEN` times the
    worst one of our padded graph, or in any case than `MOST_OF_A_TOKEN`; what was timed stays in the figures."""
    limit = min(max(TOLERANCE, WORST_TOKEN * (padded or 0.0)), MOST_OF_A_TOKEN)
    if found.failure or worst <= limit:
        return found
    failure = f"relative error {worst:.1e} of a token, above {float(f'{limit:.2g}'):g}"
    return Measurement(rel_err=found.rel_err, reasons=found.reasons, failure=failure)
