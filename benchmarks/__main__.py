"""``python -m benchmarks``: measures and keeps results; see `--help`, and docs/performance.md for how to read them."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import cases
from benchmarks.environment import gpu_driver, new_run, present_commit
from benchmarks.hashes import kernel_hash
from benchmarks.measure import ROUNDS, Measurement
from benchmarks.recorder import Recorder
from benchmarks.results import FOLDER, Ceilings, Device, Results
from benchmarks.tables import DOCUMENTS, check, problem_of, regenerated
from benchmarks.workers import most_workers
from engine.errors import DeviceError

_KERNEL_COMPILE_SECONDS = 120.0
_MODEL_COMPILE_SECONDS = 240.0
_TUNE_SECONDS = 120.0
_PACKED_COMPILE_SECONDS, _PACKED_TUNE_SECONDS = 100.0, 20.0


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    commands = {
        "kernels": kernels, "tiles": tiles, "models": models, "packed": packed, "accuracy": accuracy, "memory": memory,
        "ready": ready, "metrics": metrics, "cpu": cpu, "exports": exports, "merge": merge, "tables": tables,
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
    deadline = _deadline(options)
    from benchmarks.gpu import kernels, session

    chosen = _chosen(options, every, session.present())
    target, device, run = session.begin(options.commit)
    assert run.ceilings is not None
    recorder = Recorder(device, run, options.results)
    for case, found, floor_us, predicted_us in kernels.measure_all(
        target, chosen, run.ceilings, options.tune, options.compile, deadline
    ):
        recorder.add(case, found, kernel_hash(device, case), floor_us=floor_us, predicted_us=predicted_us)
    return recorder.end(len(chosen))


def models(options: argparse.Namespace) -> int:
    """Whole models on the GPU."""
    begin, deadline = time.monotonic(), _deadline(options)
    from benchmarks.gpu import session

    chosen = _chosen(options, cases.GPU_MODELS, session.present())
    compiled = cases.select(chosen, options.compile_case) if options.compile else []
    with _model_files(options.models, [case.model for case in chosen]) as files:
        from benchmarks.gpu import models

        _, device, run = session.begin(options.commit)
        assert run.ceilings is not None
        recorder = Recorder(device, run, options.results)
        begin += _tuned(options, chosen, files)  # torch.compile has its own time
        until = begin + options.compile
        for case, found in models.measure_all(chosen, files, run.ceilings, compiled, until, deadline, options.workers):
            recorder.add(
                case, found.measurement, kernel_hash(device, case), floor_us=found.floor_us, run_us=found.run_us,
                host_us=found.host_us,
            )  # fmt: skip
        return recorder.end(len(chosen))


def packed(options: argparse.Namespace) -> int:
    """Encoders on packed tokens on the GPU."""
    begin, deadline = time.monotonic(), _deadline(options)
    from benchmarks.gpu import session

    chosen = _chosen(options, cases.PACKED, session.present())
    with _model_files(options.models, [case.model for case in chosen]) as files:
        from benchmarks.gpu import packed

        _, device, run = session.begin(options.commit)
        assert run.ceilings is not None
        recorder = Recorder(device, run, options.results)
        begin += _tuned(options, chosen, files)  # torch.compile has its own time
        until = begin + options.compile if options.compile else None
        for case, found in packed.measure_all(chosen, files, run.ceilings, until, deadline, options.workers):
            recorder.add(
                case, found.measurement, kernel_hash(device, case), floor_us=found.floor_us, run_us=found.run_us,
                figures=found.figures,
            )  # fmt: skip
        return recorder.end(len(chosen))


def tiles(options: argparse.Namespace) -> int:
    """The ways in which convolutions could run; nothing is kept."""
    deadline = _deadline(options)
    from benchmarks.gpu import session, tiles
    from engine.targets.cuda.target import CudaTarget

    target = CudaTarget(session.GPU)
    chosen = cases.select(cases.conv.CASES, options.case, options.part)
    for case, found in tiles.measure_all(target, chosen, options.most, deadline):
        print(case.name, flush=True)
        for one in found:
            predicted = "" if one.predicted_us is None else f" (predicted {one.predicted_us:.2f})"
            print(f"  {one.us:.2f} µs{predicted} {one.variant.name}", flush=True)
    return 0


def accuracy(options: argparse.Namespace) -> int:
    """Models on the GPU in every precision: distance from float64, steps, memory."""
    deadline = _deadline(options)
    from benchmarks.gpu import accuracy, session

    device = session.present()
    chosen = _chosen(options, cases.ACCURACY, device)
    with _model_files(options.models, [case.model for case in chosen]) as files:
        recorder = Recorder(device, new_run("gpu", options.commit, None, gpu_driver(session.GPU)), options.results)
        for case, found in accuracy.measure_all(chosen, files, deadline, options.workers):
            recorder.add(case, found.measurement, kernel_hash(device, case), facts=found.facts)
        return recorder.end(len(chosen))


def memory(options: argparse.Namespace) -> int:
    """What attention over one very long sequence takes of a GPU's memory."""
    deadline = _deadline(options)
    from benchmarks.gpu import memory, session

    device = session.present()
    chosen = _chosen(options, cases.MEMORY, device)
    recorder = Recorder(device, new_run("gpu", options.commit, None, gpu_driver(session.GPU)), options.results)
    for case, measurement, facts in memory.measure_all(chosen, deadline):
        recorder.add(case, measurement, kernel_hash(device, case), facts=facts)
    return recorder.end(len(chosen))


def metrics(options: argparse.Namespace) -> int:
    """What the kernel metrics of a GPU cost, and how far they are from ncu's."""
    deadline = _deadline(options)
    from benchmarks.gpu import metrics, ncu, session

    profiler = None if options.no_ncu else ncu.find(options.ncu)
    device = session.present()
    chosen = _chosen(options, cases.METRICS, device)
    with _model_files(options.models, [case.of.model for case in chosen]) as files:
        recorder = Recorder(device, new_run("gpu", options.commit, None, gpu_driver(session.GPU)), options.results)
        outcomes = []
        for case, found in metrics.measure_all(chosen, files, profiler, deadline):
            outcomes.append((case, found))
            measurement = Measurement(failure=found.failure, reasons=found.reasons)
            recorder.add(case, measurement, kernel_hash(device, case), figures=found.figures)
        if options.each is not None:
            metrics.write_kernels(options.each, outcomes)
        return recorder.end(len(chosen))


def ready(options: argparse.Namespace) -> int:
    """The HTTP server's start, with the default models."""
    from benchmarks.ready import measure_all

    _require_models(options.models, list(cases.models.DEFAULTS))
    if options.device == "cpu":
        device, chosen = _cpu_device(options.threads), cases.ready.CPU_CASES
        run = new_run("cpu", options.commit, None)
    else:
        from benchmarks.gpu import session

        device, chosen = session.present(), cases.ready.GPU_CASES
        run = new_run("gpu", options.commit, None, gpu_driver(session.GPU))
    recorder = Recorder(device, run, options.results)
    for case, found in measure_all(chosen, options.models, options.threads):
        recorder.add(case, found.measurement, kernel_hash(device, case), seconds=found.seconds)
    return recorder.end(len(chosen))


def cpu(options: argparse.Namespace) -> int:
    """Models and layers on the CPU."""
    from benchmarks.cpu.measure import measure_case
    from engine.targets.cpu.ceilings import ceilings
    from engine.targets.cpu.codegen.isa import host_isa
    from engine.targets.cpu.system import cache_bytes

    deadline = _deadline(options)
    suites = options.suite or ("models", "layers")
    every: list[cases.models.ModelCase | cases.cpu.LayerCase] = []
    every += cases.CPU_MODELS if "models" in suites else ()
    every += cases.CPU_LAYERS if "layers" in suites else ()
    device = _cpu_device(options.threads)
    chosen = _chosen(options, every, device)
    _require_models(options.models, [case.model for case in chosen if isinstance(case, cases.models.ModelCase)])
    reached = ceilings(host_isa(), options.threads)
    if not reached.calm:
        print(
            f"the machine is busy ({reached.load:.1f} runnable processes per core): ceilings and times are not its best"
        )
    limits = Ceilings(reached.flops, reached.bytes, cache_bytes(options.threads), reached.cached_bytes)
    recorder = Recorder(device, new_run("cpu", options.commit, limits), options.results)
    for case in chosen:
        if time.monotonic() >= deadline:
            break
        measurement, floor_us = measure_case(case, options.models, options.threads, options.rounds, limits)
        recorder.add(case, measurement, kernel_hash(device, case), floor_us=floor_us)
    return recorder.end(len(chosen))


def exports(options: argparse.Namespace) -> int:
    """Models as their exporters write them, on the CPU."""
    from benchmarks.exports import measure_all

    deadline = _deadline(options)
    device = _cpu_device(options.threads)
    chosen = _chosen(options, cases.exports.CASES, device)
    recorder = Recorder(device, new_run("cpu", options.commit, None), options.results)
    for case, found in measure_all(chosen, deadline):
        present = kernel_hash(device, case)
        recorder.add(case, found.measurement, present, facts=found.facts, producer=found.producer)
    return recorder.end(len(chosen))


def _tuned(options: argparse.Namespace, chosen: Sequence[cases.models.ModelCase], files: Mapping[str, Path]) -> float:
    """Have products of the models tuned, if that is asked for; the seconds that it took."""
    from benchmarks.gpu.tuning import tune_models

    begin = time.monotonic()
    if options.tune:
        tune_models(chosen, files, options.tune)
    return time.monotonic() - begin


def _deadline(options: argparse.Namespace) -> float:
    """When no more cases are begun, as `time.monotonic` has it."""
    return time.monotonic() + (math.inf if options.deadline is None else options.deadline)


def _chosen(options: argparse.Namespace, every: Iterable[cases.AnyCase], device: Device) -> list[cases.AnyCase]:
    """The cases of `every` that the options ask for. Rows count as there that are in the folder written to or in that
    of the committed results."""
    chosen = cases.select(every, options.case, options.part)
    if not options.missing:
        return chosen
    known = [Results.of(device, folder) for folder in (options.results, FOLDER)]
    missing = [case for case in chosen if all(problem_of(results, case) for results in known)]
    if chosen and not missing:
        print("nothing is missing")
        sys.exit(0)
    return missing


def _cpu_device(threads: int) -> Device:
    from engine.targets.cpu.ceilings import processor_name
    from engine.targets.cpu.codegen.isa import host_isa

    return Device(f"{processor_name()} {host_isa().cpu}, {threads} threads")


def merge(options: argparse.Namespace) -> int:
    """Rows measured elsewhere, into the committed files, which lose the rows that the committed lists have not any
    more."""
    for path in options.files:
        try:
            other = Results.load(path)
            results = Results.of(other.device, options.results)
            results.merge(other)
            suites = cases.suites_of(other.device.stem).values()
            listed = {(case.suite, case.name) for every in suites for case in every}
            dropped = results.keep(listed | set(other.rows))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        lost = f", {dropped} not listed any more dropped" if dropped else ""
        print(f"{results.save(options.results)}: {len(other.rows)} rows of {path}, {len(results.rows)} in all{lost}")
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
    measuring.add_argument("--missing", action="store_true", help="only cases whose row is missing, failed or stale")
    measuring.add_argument(
        "--deadline", type=float, metavar="SECONDS", help="begin no case after so long, and end with what there is"
    )
    _add_commit(measuring)
    repository = argparse.ArgumentParser(add_help=False)
    repository.add_argument("--models", type=Path, default=Path("models"), help="repository (default: %(default)s)")

    command = commands.add_parser("kernels", parents=[measuring], help="single kernels on the GPU")
    command.add_argument("--suite", action="append", choices=cases.KERNELS, help="(default: all)")
    _add_tune(command)
    _add_compile(command, 0.0, _KERNEL_COMPILE_SECONDS, "a case")
    command = commands.add_parser("tiles", help="ways in which convolutions could run, on the GPU; nothing is kept")
    _add_substrings(command, "--case", "only cases whose name contains this, or one of these where it is repeated")
    command.add_argument("--part", type=_part, default=(1, 1), metavar="1/3", help="only this part of the cases")
    command.add_argument("--most", type=int, default=12, help="tiles of a kernel (default: %(default)s)")
    command.add_argument("--deadline", type=float, metavar="SECONDS", help="begin no case after so long")
    command = commands.add_parser("models", parents=[measuring, repository], help="whole models on the GPU")
    _add_tune(command)
    _add_compile(command, _MODEL_COMPILE_SECONDS, _MODEL_COMPILE_SECONDS, "all cases together, from the start")
    _add_substrings(command, "--compile-case", "torch.compile only for the cases, of those chosen, that contain this")
    _add_workers(command)
    command = commands.add_parser(
        "packed", parents=[measuring, repository], help="encoders on packed tokens on the GPU"
    )
    _add_tune(command, _PACKED_TUNE_SECONDS)
    _add_compile(command, _PACKED_COMPILE_SECONDS, _PACKED_COMPILE_SECONDS, "all cases together, from the start")
    _add_workers(command)
    command = commands.add_parser(
        "accuracy", parents=[measuring, repository], help="errors, steps and memory of models on the GPU"
    )
    _add_workers(command)
    commands.add_parser("memory", parents=[measuring], help="memory that a long sequence takes on the GPU")
    command = commands.add_parser("ready", parents=[results, repository], help="seconds until the server answers")
    command.add_argument("--device", choices=("cpu", "cuda"), required=True, help="of the server")
    _add_threads(command, "of the engine on the CPU")
    _add_commit(command)
    command = commands.add_parser(
        "metrics", parents=[measuring, repository], help="cost and error of the kernel metrics on the GPU"
    )
    command.add_argument("--ncu", default="ncu", metavar="PATH", help="Nsight Compute (default: that on the PATH)")
    command.add_argument("--no-ncu", action="store_true", help="without it: only the cost, and sums of stamps")
    command.add_argument("--each", type=Path, metavar="FILE", help="write every kernel beside ncu as CSV")
    command = commands.add_parser("cpu", parents=[measuring, repository], help="models and layers on the CPU")
    command.add_argument("--suite", action="append", choices=("models", "layers"), help="(default: both)")
    _add_threads(command, "of each side")
    command.add_argument("--rounds", type=int, default=ROUNDS, help="alternating rounds (default: %(default)s)")
    command = commands.add_parser("exports", parents=[measuring], help="models of several exporters, on the CPU")
    _add_threads(command, "of the device whose rows they are")
    command = commands.add_parser("tables", parents=[results], help="the documents' tables, from the results")
    command.add_argument("documents", nargs="*", type=Path, default=list(DOCUMENTS), help="(default: README and docs)")
    command.add_argument("--check", action="store_true", help="change nothing; say what is missing, stale or failed")
    command = commands.add_parser("merge", parents=[results], help="rows of files measured elsewhere, into the results")
    command.add_argument("files", nargs="+", type=Path)
    return parser


def _add_substrings(command: argparse.ArgumentParser, name: str, meaning: str) -> None:
    command.add_argument(name, action="append", default=[], metavar="SUBSTRING", help=meaning)


def _add_tune(command: argparse.ArgumentParser, default: float = _TUNE_SECONDS) -> None:
    command.add_argument(
        "--tune", type=float, default=default, metavar="SECONDS",
        help="the tuner begins to time no product later, before anything else (0: it times none; default: %(default)g)",
    )  # fmt: skip


def _add_compile(command: argparse.ArgumentParser, default: float, most: float, what: str) -> None:
    command.add_argument(
        "--compile", type=float, nargs="?", default=default, const=most, metavar="SECONDS",
        help=f"torch.compile takes part and has so long for {what} (0: it takes none; default: %(default)g)",
    )  # fmt: skip


def _add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", type=int, default=most_workers(), help="processes at once (default: %(default)s)")


def _add_threads(command: argparse.ArgumentParser, whose: str) -> None:
    cores = min(2, os.cpu_count() or 1)
    command.add_argument("--threads", type=int, default=cores, help=f"{whose} (default: %(default)s)")


def _add_commit(command: argparse.ArgumentParser) -> None:
    command.add_argument("--commit", default=present_commit(), help="what rows say (default: that of the checkout)")


def _part(text: str) -> tuple[int, int]:
    try:
        return cases.part_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
