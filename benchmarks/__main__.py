"""``python -m benchmarks``: measures and keeps results; see `--help`, and docs/performance.md for how to read them."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import cases
from benchmarks.environment import gpu_driver, new_run, present_commit
from benchmarks.hashes import kernel_hash
from benchmarks.measure import ROUNDS
from benchmarks.recorder import Recorder
from benchmarks.results import FOLDER, Ceilings, Device, Results
from benchmarks.tables import DOCUMENTS, check, regenerated
from engine.errors import DeviceError

_COMPILE_SECONDS = 120.0


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    commands = {
        "kernels": kernels, "models": models, "accuracy": accuracy, "cpu": cpu, "merge": merge, "tables": tables,
    }  # fmt: skip
    run = commands[options.command]
    try:
        return run(options)
    except (DeviceError, ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def kernels(options: argparse.Namespace) -> int:
    """Single kernels on the GPU."""
    every = [case for suite in options.suite or cases.KERNELS for case in cases.KERNELS[suite]]
    chosen = cases.select(every, options.case, options.part)
    from benchmarks.gpu import kernels, session

    target, device, run = session.begin(options.commit)
    assert run.ceilings is not None
    recorder = Recorder(device, run, options.results)
    for case, measurement, floor_us in kernels.measure_all(target, chosen, run.ceilings, options.compile):
        recorder.add(case, measurement, floor_us, kernel_hash(device, case))
    return recorder.end()


def models(options: argparse.Namespace) -> int:
    """Whole models on the GPU."""
    chosen = cases.select(cases.GPU_MODELS, options.case, options.part)
    compiled = cases.select(chosen, options.compile_case)
    with _model_files(options.models, [case.model for case in chosen]) as files:
        from benchmarks.gpu import models, session

        _, device, run = session.begin(options.commit)
        assert run.ceilings is not None
        recorder = Recorder(device, run, options.results)
        for case, outcome in models.measure_all(chosen, files, run.ceilings, options.compile, compiled):
            recorder.add(case, outcome.measurement, outcome.floor_us, kernel_hash(device, case), outcome.run_us)
        return recorder.end()


def accuracy(options: argparse.Namespace) -> int:
    """Models on the GPU in every precision: distance from fp32, steps, memory."""
    chosen = cases.select(cases.ACCURACY, options.case, options.part)
    with _model_files(options.models, [case.model for case in chosen]) as files:
        from benchmarks.gpu import accuracy
        from engine.targets.cuda.device import Device as Gpu

        gpu = Gpu(0)
        device = Device(gpu.name, gpu.architecture.name, gpu.multiprocessors)
        recorder = Recorder(device, new_run("gpu", options.commit, None, gpu_driver(gpu.index)), options.results)
        for case, measurement, facts in accuracy.measure_all(chosen, files):
            recorder.add(case, measurement, None, kernel_hash(device, case), facts=facts)
        return recorder.end()


def cpu(options: argparse.Namespace) -> int:
    """Models and layers on the CPU."""
    from benchmarks.cpu.measure import measure_case
    from engine.targets.cpu.ceilings import ceilings, processor_name
    from engine.targets.cpu.codegen.isa import host_isa
    from engine.targets.cpu.system import cache_bytes

    suites = options.suite or cases.CPU
    every: list[cases.models.ModelCase | cases.cpu.LayerCase] = []
    every += cases.CPU_MODELS if "models" in suites else ()
    every += cases.CPU_LAYERS if "layers" in suites else ()
    chosen = cases.select(every, options.case, options.part)
    _require_models(options.models, [case.model for case in chosen if isinstance(case, cases.models.ModelCase)])
    reached = ceilings(host_isa(), options.threads)
    if not reached.calm:
        print(
            f"the machine is busy ({reached.load:.1f} runnable processes per core): ceilings and times are not its best"
        )
    limits = Ceilings(reached.flops, reached.bytes, cache_bytes(options.threads), reached.cached_bytes)
    device = Device(f"{processor_name()} {host_isa().cpu}, {options.threads} threads")
    recorder = Recorder(device, new_run("cpu", options.commit, limits), options.results)
    for case in chosen:
        measurement, floor_us = measure_case(case, options.models, options.threads, options.rounds, limits)
        recorder.add(case, measurement, floor_us, kernel_hash(device, case))
    return recorder.end()


def merge(options: argparse.Namespace) -> int:
    """Rows measured elsewhere, into the committed files."""
    for path in options.files:
        try:
            other = Results.load(path)
            results = Results.of(other.device, options.results)
            results.merge(other)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        print(f"{results.save(options.results)}: {len(other.rows)} rows of {path}, {len(results.rows)} in all")
    return 0


def tables(options: argparse.Namespace) -> int:
    """The tables of the documents."""
    if not options.check:
        for document in options.documents:
            document.write_text(regenerated(document.read_text(encoding="utf-8"), options.results), encoding="utf-8")
        return 0
    problems = list(check(options.results, options.documents))
    print(*problems, f"{len(problems)} problems", sep="\n")
    return 1 if problems else 0


@contextmanager
def _model_files(repository: Path, names: list[str]) -> Iterator[dict[str, Path]]:
    """The model files by name: those of the repository, and the architectures, built into a temporary folder."""
    from benchmarks.models.store import build_all, model_file

    built = [name for name in dict.fromkeys(names) if name in cases.models.ARCHITECTURES]
    found = [name for name in dict.fromkeys(names) if name not in built]
    _require_models(repository, found)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        build_all(built, Path(folder))
        if built:
            print(f"built {', '.join(built)}: {time.monotonic() - begin:.0f} s", flush=True)
        yield {name: model_file(Path(folder) if name in built else repository, name) for name in (*found, *built)}


def _require_models(repository: Path, names: list[str]) -> None:
    for name in dict.fromkeys(names):
        if not (repository / name / "1" / "model.onnx").is_file():
            sys.exit(f"error: {repository} has no built {name}: python -m models --dir {repository} {name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    results = argparse.ArgumentParser(add_help=False)
    results.add_argument("--results", type=Path, default=FOLDER, help="folder of results files (default: %(default)s)")
    measuring = argparse.ArgumentParser(add_help=False, parents=[results])
    _add_substrings(measuring, "--case", "only cases whose name contains this, or one of these where it is repeated")
    measuring.add_argument("--part", type=_part, default=(1, 1), metavar="1/3", help="only this part of the cases")
    measuring.add_argument("--commit", default=present_commit(), help="what rows say (default: that of the checkout)")
    repository = argparse.ArgumentParser(add_help=False)
    repository.add_argument("--models", type=Path, default=Path("models"), help="repository (default: %(default)s)")

    command = commands.add_parser("kernels", parents=[measuring], help="single kernels on the GPU")
    command.add_argument("--suite", action="append", choices=cases.KERNELS, help="(default: all)")
    _add_compile(command, 0.0)
    command = commands.add_parser("models", parents=[measuring, repository], help="whole models on the GPU")
    _add_compile(command, _COMPILE_SECONDS)
    _add_substrings(command, "--compile-case", "torch.compile only for the cases, of those chosen, that contain this")
    commands.add_parser(
        "accuracy", parents=[measuring, repository], help="errors, steps and memory of models on the GPU"
    )
    command = commands.add_parser("cpu", parents=[measuring, repository], help="models and layers on the CPU")
    command.add_argument("--suite", action="append", choices=cases.CPU, help="(default: all)")
    cores = min(2, os.cpu_count() or 1)
    command.add_argument("--threads", type=int, default=cores, help="of each side (default: %(default)s)")
    command.add_argument("--rounds", type=int, default=ROUNDS, help="alternating rounds (default: %(default)s)")
    command = commands.add_parser("tables", parents=[results], help="the documents' tables, from the results")
    command.add_argument("documents", nargs="*", type=Path, default=list(DOCUMENTS), help="(default: README and docs)")
    command.add_argument("--check", action="store_true", help="change nothing; say what is missing, stale or failed")
    command = commands.add_parser("merge", parents=[results], help="rows of files measured elsewhere, into the results")
    command.add_argument("files", nargs="+", type=Path)
    return parser


def _add_substrings(command: argparse.ArgumentParser, name: str, meaning: str) -> None:
    command.add_argument(name, action="append", default=[], metavar="SUBSTRING", help=meaning)


def _add_compile(command: argparse.ArgumentParser, default: float) -> None:
    command.add_argument(
        "--compile", type=float, nargs="?", default=default, const=_COMPILE_SECONDS, metavar="SECONDS",
        help="let torch.compile take part, for at most so long (0: leave it out; default: %(default)g)",
    )  # fmt: skip


def _part(text: str) -> tuple[int, int]:
    try:
        return cases.part_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
