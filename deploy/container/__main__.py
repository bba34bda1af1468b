"""`python -m deploy.container FOLDER`: walk through the Dockerfile in a folder (deploy/container/walk.py says how), and
hold the images to their sizes."""

import argparse
import sys
from pathlib import Path

from deploy.container.walk import Report, Walk, WalkError

LIMITS = {"service": 600e6, "service-cuda": 3e9}
"""Bytes of an image, unpacked."""


def main() -> int:
    """Build, run and measure; 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m deploy.container", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to build; needs some 5 GB; finished stages are used again")
    parser.add_argument("--target", choices=LIMITS, action="append", help="images (default: all)")
    arguments = parser.parse_args()
    walk = Walk(Path(__file__).parent.parent.parent, arguments.folder.absolute())
    too_large = []
    for target in arguments.target or LIMITS:
        try:
            walk.build(target)
            report = walk.measure(target, walk.serve(target))
        except WalkError as error:
            print(f"{target}: {error}", file=sys.stderr)
            return 1
        _print(report)
        if report.total > LIMITS[target]:
            too_large.append(target)
    for target in too_large:
        print(f"{target} is larger than {LIMITS[target] / 1e6:,.0f} MB", file=sys.stderr)
    return 1 if too_large else 0


def _print(report: Report) -> None:
    print(
        f"\n{report.target}: {report.total / 1e6:,.0f} MB, healthy after {report.ready_seconds:.1f} s, ended by SIGTERM"
    )
    for title, sizes in (("folder", report.folders), ("package", report.packages)):
        for name, size in sizes[:14]:
            print(f"  {title:8} {name:28} {size / 1e6:8.1f} MB")


if __name__ == "__main__":
    sys.exit(main())
