"""How many cases of every kernel family were checked, and how close they came to their bounds. `run_cases` counts, the
summary at the end of a run prints (conftest.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite

from engine.ir import expr as ex
from engine.ir import ops
from engine.plan.plan import Step

Row = tuple[int, int, float]
"""Cases, those that failed, the largest error over its bound of the others."""

_NAMES: Mapping[type[ops.Op], str] = {
    ops.Gemm: "gemm",
    ops.Attention: "attention",
    ops.Norm: "norm",
    ops.RowFactors: "norm",
    ops.Softmax: "softmax",
    ops.Reduce: "reduction",
    ops.Pool: "pool",
    ops.ConvExcitation: "depthwise convolution",
    ops.ConvBlock: "convolution",
    ops.ConvMax: "convolution",
    ops.ConvMean: "depthwise convolution",
    ops.Excitation: "convolution",
    ops.Gather: "gather",
    ops.Scatter: "scatter",
    ops.Concat: "pad, concat, copy",
    ops.Pad: "pad, concat, copy",
    ops.Resize: "resize",
    ops.TopK: "top-k",
    ops.Running: "running sum",
    ops.Recurrent: "recurrent",
}
_OTHERS = ("convolution", "depthwise convolution", "transposed convolution", "point-wise")
FAMILIES = tuple(dict.fromkeys((*_NAMES.values(), *_OTHERS)))


def family(step: Step) -> str:
    """The family that a step is a case of."""
    op = step.op
    if isinstance(op, ops.Conv):
        if op.transposed:
            return "transposed convolution"
        return "depthwise convolution" if op.groups > 1 and step.inputs[1].shape[1] == 1 else "convolution"
    if isinstance(op, ops.Pointwise):
        copies = all(isinstance(store, ex.Arg) for store in op.stores)
        return "gather" if op.gathers else "pad, concat, copy" if copies else "point-wise"
    return _NAMES[type(op)]


@dataclass
class Tally:
    """The rows of one test, by family."""

    rows: dict[str, Row] = field(default_factory=dict)

    def count(self, step: Step, ratio: float, failed: bool) -> None:
        name = family(step)
        self.rows[name] = joined([self.rows.get(name, (0, 0, 0.0)), (1, int(failed), 0.0 if failed else ratio)])


def joined(rows: Iterable[Row]) -> Row:
    cases, failing, worst = zip(*rows, strict=True)
    return sum(cases), sum(failing), max(worst)


def lines(tallies: Iterable[Mapping[str, Row]], least: int) -> list[str]:
    """A line for every family, and a word where it has fewer than `least` cases."""
    every = list(tallies)
    found = {name: [tuple(tally[name]) for tally in every if name in tally] for name in FAMILIES}
    result = []
    for name, rows in found.items():
        cases, failing, worst = joined(rows) if rows else (0, 0, 0.0)
        few = "" if cases >= least else f"  fewer than {least} cases"
        share = f"{worst:.2f}" if isfinite(worst) else "–"
        result.append(f"{name:24} {cases:6} cases {failing:4} failing  worst error/bound {share}{few}")
    return result
