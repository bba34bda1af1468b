"""`GET /v2/models/{model}/profile`: the plans of a model and the steps of one, from the engine wherever it runs."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from service.workers.messages import ModelKey, Profile
from service.workers.profiles import profile_report
from tests.service.conftest import Running, Start, add_model, error_of
from tests.service.fakes import PlanProfile, ProfileRow


def test_a_model_that_ran_has_its_steps(shared: Running) -> None:
    assert shared.identity([1.0] * 12).status_code == 200  # three rows: a plan that the warm-up has not made
    answer = shared.client.get("/v2/models/identity/profile", params={"plan": "batch=3"}).json()
    assert (answer["name"], answer["version"], answer["plan"]) == ("identity", "1", "batch=3")
    assert answer["device"] == {
        "device": "cpu", "name": "Fake CPU", "arch": "test", "threads": 1,
        "peak_flops": 1e12, "peak_bytes": 1e11, "peak_cache_bytes": 1e12,
    }  # fmt: skip
    (plan,) = (plan for plan in answer["plans"] if plan["name"] == "batch=3")
    assert plan["sizes"] == {"batch": 3} and plan["runs"] >= 1 and plan["seconds"] == pytest.approx(1.1e-3)
    assert answer["steps"][0] == {
        "step": "sums", "op": "Gemm", "kernel": "gemm_f32", "result": "f32 [1, 4]", "calls": plan["runs"],
        "seconds": 1e-3, "flops": 5 * 10**8, "bytes": 10**6, "cached_bytes": 10**6, "roofline": 0.5,
        "flops_per_second": pytest.approx(5e11), "bytes_per_second": pytest.approx(1e9),
    }  # fmt: skip
    assert answer["steps"][1]["flops_per_second"] == 0


def test_without_a_name_the_plan_with_the_most_time_is_shown(shared: Running) -> None:
    for _ in range(12):
        shared.identity([1.0] * 20)
    answer = shared.client.get("/v2/models/identity/versions/1/profile").json()
    assert answer["plan"] == "batch=5"


@pytest.mark.parametrize(
    ("path", "status", "named"),
    [
        ("identity/profile?plan=batch%3D99", 404, "no plan 'batch=99' ready; the last ones used are batch="),
        ("identity/profile?plans=x", 400, "there is no parameter 'plans'; the query takes version, plan"),
        ("nobody/profile", 404, "there is no model 'nobody'"),
        ("identity/versions/7/profile", 404, "no version '7'"),
    ],
)
def test_what_is_not_there_is_named(shared: Running, path: str, status: int, named: str) -> None:
    answer = shared.client.get(f"/v2/models/{path}")
    assert answer.status_code == status
    assert named in error_of(answer)


def test_a_model_that_is_not_ready_has_no_profile(start: Start, tmp_path: Path) -> None:
    add_model(tmp_path, "broken", "no such kind")
    answer = start(tmp_path).client.get("/v2/models/broken/profile")
    assert answer.status_code == 503 and "broken" in error_of(answer)


def test_a_model_without_plans_has_an_empty_profile() -> None:
    report = profile_report(Profile(7, ModelKey("m", 1), None), ())
    assert (report.id, report.plans, report.plan, report.steps) == (7, (), None, ())


def test_a_model_of_fixed_sizes_has_one_plan() -> None:
    row = ProfileRow("only", "conv", "Conv", 4, 0.5, 10, 20, 0, 0.1)
    report = profile_report(Profile(1, ModelKey("m", 1), None), (PlanProfile({}, (row,), ("f32 [1]",)),))
    assert report.plan == report.plans[0].name == "fixed"
    assert (report.plans[0].runs, report.plans[0].seconds, report.steps[0].result) == (4, 0.5, "f32 [1]")


def test_openapi_has_the_profile(shared: Running) -> None:
    answer: httpx.Response = shared.client.get("/openapi.json")
    assert {"/v2/models/{model}/profile", "/v2/models/{model}/versions/{version}/profile"} < set(answer.json()["paths"])
