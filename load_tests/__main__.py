"""`python -m load_tests NAME`: what the service is measured by. The last line says PASS or FAIL; the exit status is 1
where something does not hold that must, or the program itself came to an end.

overhead, models: beside LitServe and mosec. lengths, fuzz, kills, overload, shutdown, crash: whether it is right under
stress. soak, cycles: whether it leaks. metrics: what its metrics cost. perf-analyzer: a sweep by the public tool. Each
starts its own servers; peers get environments of their own in load_tests/.peers.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from load_tests import (
    clients_gone,
    crash,
    cycles,
    end_to_end,
    fuzz,
    lengths,
    metrics_cost,
    overhead,
    overload,
    perf_analyzer,
    shutdown,
    soak,
)
from load_tests.report import Report

PROGRAMS = {
    "overhead": overhead,
    "models": end_to_end,
    "lengths": lengths,
    "fuzz": fuzz,
    "soak": soak,
    "cycles": cycles,
    "kills": clients_gone,
    "overload": overload,
    "shutdown": shutdown,
    "crash": crash,
    "metrics": metrics_cost,
    "perf-analyzer": perf_analyzer,
}


def main() -> int:
    """Run one program."""
    parser = argparse.ArgumentParser(prog="python -m load_tests", description=__doc__)
    programs = parser.add_subparsers(dest="name", required=True)
    for name, program in PROGRAMS.items():
        own = programs.add_parser(name, help=(program.__doc__ or "").splitlines()[0])
        own.add_argument("--output", type=Path, help="a file for the results, as JSON")
        own.add_argument("--logs", type=Path, help="a folder for the servers' logs, which else are thrown away")
        own.add_argument("--server-arguments", default="", help="further arguments of our server, in one string")
        program.add_arguments(own)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="load-tests-") as temporary:
        folder = Path(temporary)
        try:
            report: Report = PROGRAMS[options.name].measure(options, folder)
        except Exception as error:
            traceback.print_exc()
            print(f"\nFAIL: {options.name}; it ended with {type(error).__name__}: {error}")
            return 1
        finally:
            if options.logs is not None:
                options.logs.mkdir(parents=True, exist_ok=True)
                for file in filter(Path.is_file, folder.iterdir()):
                    shutil.copy(file, options.logs)
    return report.finish(options.output)


if __name__ == "__main__":
    sys.exit(main())
