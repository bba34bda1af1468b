"""`python -m load_tests.capacity` against a server that runs: locust's users, every scenario, the report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from load_tests.servers import ROOT, tilewave


def test_every_scenario_gets_right_answers_and_is_reported(model_repository: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("inference,metrics 0123456789abcdef\n")
    keys.chmod(0o600)
    with tilewave(model_repository, tmp_path, "--device", "cpu", "--api-keys", str(keys)) as server:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "load_tests.capacity", "--target", f"http://127.0.0.1:{server.port}"),
                *("--seconds", "1", "--settle", "0.1", "--most-users", "1", "--output", str(tmp_path / "out")),
            ],
            cwd=ROOT,
            env={**os.environ, "API_KEY": "0123456789abcdef"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    stages = json.loads((tmp_path / "out" / "results.json").read_text())["stages"]
    expected = [("images", 1), ("tokens", 1), ("tensors", 1), ("burst", 2), ("burst", 8), ("burst", 2)]
    assert [(stage["scenario"], stage["users"]) for stage in stages] == expected
    for stage in stages:
        assert stage["rate"] > 0 and not stage["failures"]
        split = stage["split"]
        assert split["requests"] > 0 and split["compute"] > 0 and split["kernels"]
        # Not more than there was; with room for scrapes that take their time on a busy machine.
        assert 0 < sum(kernel["seconds"] for kernel in split["kernels"]) < 2 * split["wall"]
    text = (tmp_path / "out" / "report.md").read_text()
    for heading in ("## Images", "## Tokens", "## Tensors", "## Burst"):
        assert f"\n{heading}\n" in text
    assert "**Not saturated** by 1 user:" in text


_GO = """
import gevent.monkey
gevent.monkey.patch_all()
from locust import User, constant, task
from load_tests.capacity import drive
class Waits(User):
    wait_time = constant(0.01)
    @task
    def nothing(self):
        self.environment.events.request.fire(
            request_type="", name="", response_time=1.0, response_length=0, exception=None, context={})
drive.fetch = lambda target, headers: {}
drive.split = lambda before, after, seconds: None
driver = drive.Driver([Waits], "http://127.0.0.1:1", {})
driver.stage(150, 0.2, 2.5)
assert driver._runner.user_count == 150, driver._runner.user_count
driver.stage(2, 0.2, 0.0)
assert driver._runner.user_count == 2, driver._runner.user_count
driver.close()
"""


def test_users_who_are_too_many_go_at_once() -> None:
    """Locust takes as many away in a second as it is told to bring."""
    done = subprocess.run([sys.executable, "-c", _GO], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("target", ["http://127.0.0.1:1", "127.0.0.1:8000"], ids=["nobody listens", "no URL"])
def test_a_server_that_cannot_be_read_is_named_before_anything_is_measured(target: str) -> None:
    command = [sys.executable, "-m", "load_tests.capacity", "--target", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"error: {target}/metrics cannot be read:")
