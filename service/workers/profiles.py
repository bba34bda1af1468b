"""What the engine says of a model's plans, as message data. Called on the statistics thread of a worker."""

from collections.abc import Sequence

from service.workers.engine_api import EnginePlanProfile
from service.workers.messages import PlanTotal, Profile, ProfileReport, StepProfile


def profile_report(command: Profile, plans: Sequence[EnginePlanProfile]) -> ProfileReport:
    """The answer to a command: totals of all plans, steps of one."""
    totals = tuple(map(_total, plans))
    wanted = command.plan
    if wanted is None and totals:
        wanted = max(totals, key=lambda total: total.runs * total.seconds).name
    for plan, total in zip(plans, totals, strict=True):
        if total.name == wanted:
            return ProfileReport(command.id, totals, wanted, _steps(plan))
    return ProfileReport(command.id, totals, None, ())


def _total(plan: EnginePlanProfile) -> PlanTotal:
    sizes = tuple(plan.sizes.items())
    name = ",".join(f"{symbol}={size}" for symbol, size in sizes) or "fixed"
    runs = max((row.calls for row in plan.rows), default=0)
    return PlanTotal(name, sizes, runs, sum(row.seconds for row in plan.rows))


def _steps(plan: EnginePlanProfile) -> tuple[StepProfile, ...]:
    return tuple(
        StepProfile(
            row.step, row.op, row.kernel, result, row.calls, row.seconds, row.flops, row.bytes, row.cached_bytes,
            row.roofline,
        )
        for row, result in zip(plan.rows, plan.results, strict=True)
    )  # fmt: skip
