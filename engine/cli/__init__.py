"""``python -m engine inspect | run | check | profile | tune``: parses arguments, calls the command. One module each."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

import engine
from engine.cli import check, inspect, profile, run, tune


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0 done, 1 a check failed, 2 an error the user can mend, 141
    nobody reads the output any more (what a shell gives for a program ended by SIGPIPE)."""
    parser = argparse.ArgumentParser(
        prog="python -m engine", description="Inspect, run, check, profile and tune ONNX models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for module in (inspect, run, check, profile, tune):
        command = commands.add_parser(module.NAME, help=module.HELP, description=module.HELP)
        command.add_argument("model", help="the .onnx file")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
        command.add_argument(
            "--precision",
            default="auto",
            help="auto, fp32, tf32, fp16 or bf16; what a device has (default: %(default)s)",
        )
        command.add_argument("--threads", type=int, default=None, help="CPU threads (default: all cores)")
        command.add_argument(
            "--packed",
            choices=("auto", "on", "off"),
            default="auto",
            help="leave out the padding of masked sequences (default: %(default)s, as is best on the device)",
        )
        command.add_argument("--strict", action="store_true", help="refuse operators without a kernel of ours")
        command.add_argument(
            "--size", action="append", default=[], metavar="NAME=N", help="size of a symbol, e.g. batch=8 (default: 1)"
        )
        module.add_arguments(command)
        command.set_defaults(function=module.main)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.function(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return 128 + signal.SIGPIPE
    except (engine.EngineError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code
