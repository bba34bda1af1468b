"""`GET /v2/models/{model}/profile`: how each step of a model's plans runs here and now, against what the device allows.

The figures of `python -m engine profile`, of the runs that requests caused. Metrics have them by kernel and operator;
single steps are here, where they make no series.
"""

from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from service.errors import NotFound, Unavailable
from service.routes.protocol_documents import PROFILE_ANSWER
from service.routes.responses import JsonResponse, ServingOf, check_query
from service.workers.messages import StepProfile

router = APIRouter(prefix="/v2", tags=["operations"])

_TIMEOUT_S = 5.0

PlanName = Annotated[str | None, Query(description="The plan whose steps to show, by its name under `plans`.")]


@router.get("/models/{model}/profile", responses=PROFILE_ANSWER, dependencies=[Depends(check_query)])
@router.get("/models/{model}/versions/{version}/profile", responses=PROFILE_ANSWER, dependencies=[Depends(check_query)])
async def model_profile(
    serving: ServingOf, model: str, version: str | None = None, plan: PlanName = None
) -> JsonResponse:
    """The plans of a model that are ready, and the steps of one: the one named, else the one with the most time."""
    served = serving.models.find(model, version)
    served.check_ready()
    try:
        report = await serving.engine.profile(served.key, plan, _TIMEOUT_S)
    except TimeoutError:
        raise Unavailable(f"the engine did not answer within {_TIMEOUT_S:g} s") from None
    if plan is not None and report.plan is None:
        known = ", ".join(total.name for total in report.plans[-8:]) or "none yet"
        raise NotFound(f"model '{model}' has no plan '{plan[:128]}' ready; the last ones used are {known}")
    return JsonResponse(
        {
            "name": served.key.name,
            "version": str(served.key.version),
            "device": asdict(served.specs.device),
            "plans": [{**asdict(total), "sizes": dict(total.sizes)} for total in report.plans],
            "plan": report.plan,
            "steps": [_step(step) for step in report.steps],
        }
    )


def _step(step: StepProfile) -> dict[str, Any]:
    per_second = 1 / step.seconds if step.seconds else 0.0
    rates = {"flops_per_second": step.flops * per_second, "bytes_per_second": step.bytes * per_second}
    return {**asdict(step), **rates}
