"""`python -m load_tests.capacity`: find out what a server can do, and write report.md and report.html.

Each scenario doubles its users until two more levels have brought nothing; `burst` has few, many, and few again.
Without --target it starts a server of its own with the default models. Exit status 1 where an answer was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from load_tests.capacity import document, report
from load_tests.capacity.drive import Driver
from load_tests.capacity.report import Scenario
from load_tests.capacity.saturation import Stage, is_saturated, saturation_point
from load_tests.capacity.scrape import fetch, fetch_ceilings
from load_tests.locustfile import HEADERS, ImageUser, TensorUser, TokenUser
from load_tests.report import machine
from load_tests.servers import ROOT, tilewave
from load_tests.workloads import default_repository

RAMPS: dict[str, tuple[Sequence[type], str]] = {
    "images": (
        [ImageUser],
        "JPEG photos of three sizes (the shorter side 240, 400 or 720 pixels) to the image endpoint of "
        "EfficientNet-Lite0.",
    ),
    "tokens": (
        [TokenUser],
        "One to eight rows to all-MiniLM-L6-v2: texts of one word to a paragraph, and ids whose lengths are lognormal "
        "(median 25 tokens, up to 256), as those of ordinary text are.",
    ),
    "tensors": (
        [TensorUser],
        "Pixels of photos to `/v2/models/efficientnet-lite0/infer` as binary tensors of 602,112 bytes, scores back as "
        "binary.",
    ),
}
BURST = "burst"
_BURST_ABOUT = "Photos, texts and ids, as many of one kind of user as of the other."
_CALM_USERS = 2
_IDLE_LOAD = 0.25  # a CPU, of a machine that has nothing else to do
_BURST_FACTOR = 8  # times the users of the latest saturation point


def main() -> int:
    """Run what was asked for."""
    options = _parser().parse_args()
    load = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        target = options.target or stack.enter_context(_own_server(options.server_arguments))
        try:  # before anything is measured
            fetch(target, HEADERS)
        except (OSError, ValueError) as error:
            print(f"error: {target}/metrics cannot be read: {error}", file=sys.stderr)
            return 2
        scenarios = _measure(options, target.rstrip("/"))
        ceilings = fetch_ceilings(target, HEADERS)
    facts = _facts(options, load, sorted({ceiling.device for ceiling in ceilings.values()}))
    document.write(report.blocks("What the server can do", facts, scenarios, ceilings), options.output)
    _store(scenarios, options.output / "results.json")
    print(f"{options.output / 'report.md'} and report.html are written")
    return 1 if any(stage.failed for scenario in scenarios for stage in scenario.stages) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m load_tests.capacity", description=__doc__)
    known = [*RAMPS, BURST]
    parser.add_argument("--target", default="", help="http://host:port of a server that runs (default: one of its own)")
    parser.add_argument("--server-arguments", default="", help="further arguments of our own server, in one string")
    parser.add_argument("--scenarios", default=",".join(known), help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a stage (default: %(default)s)")
    parser.add_argument(
        "--settle", type=float, default=1.5, help="seconds before a stage counts (default: %(default)s)"
    )
    parser.add_argument(
        "--most-users", type=int, default=256, help="where a ramp ends at the latest (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "load", help="a folder (default: build/load)")
    return parser


@contextlib.contextmanager
def _own_server(arguments: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="load-tests-") as temporary:
        folder = Path(temporary)
        models = default_repository(folder, "efficientnet-lite0", "all-minilm-l6-v2")
        with tilewave(models, folder, *arguments.split()) as server:
            yield f"http://127.0.0.1:{server.port}"


def _measure(options: argparse.Namespace, target: str) -> list[Scenario]:
    wanted = options.scenarios.split(",")
    unknown = set(wanted) - {*RAMPS, BURST}
    if unknown:
        raise SystemExit(f"error: there is no scenario {min(unknown)!r}; there are {', '.join([*RAMPS, BURST])}")
    found: list[Scenario] = []
    for name in wanted:
        kinds, about = RAMPS.get(name, ([ImageUser, TokenUser], _BURST_ABOUT))
        driver = Driver(kinds, target, HEADERS)
        try:
            if name == BURST:
                known = (saturation_point(ramp.stages).users for ramp in found)
                users = max(known, default=max(options.most_users // _BURST_FACTOR, 1))
                levels = (_CALM_USERS, users * _BURST_FACTOR, _CALM_USERS)
                settle = 0.0  # what follows upon the change is what is looked for
                stages = [_stage(driver, name, level, options.seconds, settle) for level in levels]
            else:
                stages = _ramp(driver, name, options)
        finally:
            driver.close()
        found.append(Scenario(name, about, stages, name == BURST))
    return found


def _ramp(driver: Driver, name: str, options: argparse.Namespace) -> list[Stage]:
    """Twice as many users each time, until more bring nothing."""
    stages: list[Stage] = []
    users = 1
    while users <= options.most_users and not is_saturated(stages):
        stages.append(_stage(driver, name, users, options.seconds, options.settle))
        users *= 2
    return stages


def _stage(driver: Driver, name: str, users: int, seconds: float, settle: float) -> Stage:
    stage = driver.stage(users, seconds, settle)
    told = f"{name}: {users} users, {stage.rate:.1f} requests/s, p99 {stage.percentile(99) * 1e3:.1f} ms"
    print(f"{told}, {stage.refused} refused, {stage.failed} failed", file=sys.stderr)
    return stage


def _facts(options: argparse.Namespace, load: float, devices: Sequence[str]) -> list[str]:
    """What a reader has to know before the figures. `load`: of this machine, before it began."""
    here = machine()
    is_busy = load > _IDLE_LOAD * here["cpus"]
    server = "a server on the same machine" if not options.target else "a server that was running already"
    return [
        f"`make load` on {here['date']}, commit {here['commit']}: {server}, models on {' and '.join(devices)}. The "
        f"users ran on {here['cpus']} CPUs ({here['cpu']}).",
        f"Every user sends its next request when it has the last answer. {options.seconds:g} s a stage, after "
        f"{options.settle:g} s to settle. Every answer is checked; only good ones count. Queue, preprocess, compute "
        "and kernels are differences of `/metrics` before and after a stage.",
        *([f"**Other work ran on this machine** (load {load:.1f} before it began): it could do more."] * is_busy),
    ]


def _store(scenarios: Sequence[Scenario], path: Path) -> None:
    """All figures, for comparisons."""

    def plain(stage: Stage) -> dict[str, object]:
        fields = dataclasses.asdict(stage)
        del fields["latencies"], fields["timeline"]
        rates = {"rate": stage.rate, **{f"p{percent}": stage.percentile(percent) for percent in (50, 95, 99)}}
        return {**fields, **rates}

    rows = [{"scenario": scenario.name, **plain(stage)} for scenario in scenarios for stage in scenario.stages]
    path.write_text(
        json.dumps({"machine": machine(), "date": time.strftime("%Y-%m-%d"), "stages": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
