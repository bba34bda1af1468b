"""Command line: ``python -m models [--dir DIR] [NAME …]`` obtains and builds the default models."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from models.catalog import RECIPES
from models.errors import ModelBuildError
from models.store import build


def main(arguments: list[str] | None = None) -> int:
    """Build the named models, or all; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m models", description="Obtain and build the default models.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RECIPES)} (default: all)")
    parser.add_argument("--dir", type=Path, default=Path("models"), help="the model repository (default: models)")
    options = parser.parse_args(arguments)
    start = time.monotonic()

    def report(line: str) -> None:
        print(f"[{time.monotonic() - start:5.1f} s] {line}", file=sys.stderr, flush=True)

    try:
        for name in options.names or RECIPES:
            build(name, options.dir, report)
    except ModelBuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run it again to go on from the last finished download", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
