"""``python -m tests.gpu.sanitize``: compute-sanitizer over every step of the covering set, checked against float64 as
well, with each of its tools; needs a GPU, and compute-sanitizer of the CUDA toolkit on the PATH. Exits with 1 where a
tool reports something, or a step is wrong.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

TOOLS = {
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": ["--racecheck-report", "all"],
    "synccheck": [],
    "initcheck": [],
}
_ROUNDING_TERMS = 2000  # of the longest sum of a step
_FAILED = 9


def check_part(part: int, parts: int) -> int:
    """Run the steps `part`, `part` + `parts`, … on the GPU; how many are wrong."""
    from engine.targets.cuda import covering
    from tests.engine.targets.cuda.gpu_runner import GpuRunner
    from tests.engine.targets.cuda.harness import Case, run_cases

    runner = GpuRunner()
    steps = list(covering.steps())[part::parts]
    failures = [line for step in steps for line in run_cases(runner, [Case(step.name, step, _ROUNDING_TERMS)])]
    print(*failures, f"{len(steps)} steps, {len(failures)} wrong", sep="\n")
    runner.close()
    return len(failures)


def sanitize(tool: str, part: int, parts: int) -> tuple[bool, str]:
    """A part under a tool: whether nothing was reported, and what was printed."""
    program = [sys.executable, "-m", "tests.gpu.sanitize", "--part", str(part), "--parts", str(parts)]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(_FAILED), *TOOLS[tool], *program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0, f"{done.stdout}{done.stderr}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitize", description=__doc__)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="only this one; can be repeated")
    parser.add_argument("--parts", type=int, default=max(1, (os.cpu_count() or 1) // 4), help="processes of a tool")
    parser.add_argument("--part", type=int, help="run this part as it is, under no tool")
    options = parser.parse_args(arguments)
    if options.part is not None:
        return int(check_part(options.part, options.parts) > 0)
    if shutil.which("compute-sanitizer") is None:
        sys.exit("error: no compute-sanitizer on the PATH; it comes with NVIDIA's CUDA toolkit")
    runs = [(tool, part) for tool in options.tool or TOOLS for part in range(options.parts)]
    with ThreadPoolExecutor(2 * options.parts) as pool:
        found = list(pool.map(lambda run: sanitize(*run, options.parts), runs))
    for (tool, part), (clean, text) in zip(runs, found, strict=True):
        last = "\n".join(text.strip().splitlines()[-40:])
        print(f"{tool} {part + 1}/{options.parts}: {'clean' if clean else last}")
    return int(not all(clean for clean, _ in found))


if __name__ == "__main__":
    sys.exit(main())
