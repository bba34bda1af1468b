"""The numerics policy: which precision a model runs in, and how `auto` decides. Called by `engine.loading`.

`auto` takes the first of `CANDIDATES` whose outputs, on a probe batch, are finite and within `BOUNDS` of the CPU
target's fp32 result. A precision that the target has no kernels for is passed over. Verdicts are kept on disk
(`Verdicts`), keyed by everything they depend on.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np

from engine.errors import DeviceError, ShapeError, UnsupportedOp
from engine.ir.dtype import DType
from engine.ir.graph import Graph

Outputs = Mapping[str, np.ndarray]
_ENGINE = Path(__file__).parent
# What decides between two runs of one model on one device: the rewrites and the kernels.
_SOURCES = ("precision.py", "ir", "passes", "targets/cuda")


class Precision(Enum):
    """Storage and compute type of the heavy operators."""

    AUTO = "auto"
    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def storage(self) -> DType:
        """The type in which activations and weights lie in memory."""
        return {Precision.FP16: DType.F16, Precision.BF16: DType.BF16}.get(self, DType.F32)


CANDIDATES = (Precision.FP16, Precision.BF16, Precision.TF32, Precision.FP32)
"""In the order in which `auto` tries them."""

BOUNDS = {Precision.FP16: 5e-3, Precision.BF16: 4e-2, Precision.TF32: 5e-3, Precision.FP32: 1e-4}
"""Relative L2 distance of every float output from fp32 on the CPU: about ten roundings to 11, 8, 11 and 24 bits."""

_PROBE_BATCH = 2
_PROBE_EXTENTS = (16, 64, 224, 1)  # of the symbols that are not the batch; the first the model accepts


@dataclass(frozen=True)
class Verdict:
    """The precision chosen, its distance from fp32 (None: not measured), and why others before it were not."""

    precision: Precision
    error: float | None
    rejected: tuple[str, ...] = ()

    def __str__(self) -> str:
        measured = "unchecked" if self.error is None else f"{self.error:.1e} from fp32"
        return f"{self.precision.value} ({'; '.join((measured, *self.rejected))})"


def decide(run: Callable[[Precision], Outputs], reference: Outputs) -> Verdict:
    """The first precision whose outputs hold against `reference`. `run` raises UnsupportedOp where a kernel is missing.

    Raises that UnsupportedOp where no precision has all the kernels, DeviceError where none is within its bound.
    """
    rejected: list[str] = []
    unsupported: list[UnsupportedOp] = []
    for precision in CANDIDATES:
        try:
            error = distance(run(precision), reference)
        except UnsupportedOp as problem:
            unsupported.append(problem)
            rejected.append(f"{precision.value}: {problem}")
            continue
        if error <= BOUNDS[precision]:
            return Verdict(precision, error, tuple(rejected))
        rejected.append(f"{precision.value}: {error:.1e} from fp32, above {BOUNDS[precision]:g}")
    if len(unsupported) == len(CANDIDATES):
        raise unsupported[0]
    raise DeviceError(f"no precision of this device is close enough to fp32: {'; '.join(rejected)}. Use device='cpu'")


def distance(outputs: Outputs, reference: Outputs) -> float:
    """The largest relative L2 distance of a float output; infinite where one is not finite although the reference is.

    Integer outputs are not judged: a rounding may decide a tie either way.
    """
    worst = 0.0
    for name, expected in reference.items():
        if not DType.of(expected.dtype).is_float:
            continue
        a, b = outputs[name].astype(np.float64), expected.astype(np.float64)
        finite = np.isfinite(b)
        if not np.isfinite(a[finite]).all():
            return float("inf")
        scale = float(np.linalg.norm(b[finite])) or 1.0
        worst = max(worst, float(np.linalg.norm(a[finite] - b[finite])) / scale)
    return worst


def probe_sizes(symbols: Iterable[tuple[str, bool]], accepts: Callable[[Mapping[str, int]], object]) -> dict[str, int]:
    """Sizes for a probe: `symbols` are (name, whether it is a batch), `accepts` raises ShapeError for sizes that the
    model refuses. Raises that ShapeError where none of the guesses fits."""
    names = tuple(symbols)
    for extent in _PROBE_EXTENTS:
        sizes = {name: _PROBE_BATCH if is_batch else extent for name, is_batch in names}
        try:
            accepts(sizes)
        except ShapeError:
            if extent == _PROBE_EXTENTS[-1]:
                raise
            continue
        return sizes
    raise AssertionError("unreachable: the last guess returns or raises")


def fingerprint(graph: Graph) -> str:
    """A hash of a graph with all its constants."""
    digest = hashlib.blake2b(digest_size=20)
    seen: dict[int, int] = {}
    for node in graph.nodes:
        digest.update(repr(node.op).encode())
        for value in node.inputs:
            number = seen.setdefault(id(value), len(seen))
            digest.update(f"{number} {value!r}".encode())
            if value.data is not None and number == len(seen) - 1:
                data = value.data
                digest.update(repr(data.tolist()).encode() if data.dtype == object else data.tobytes())
        for value in node.outputs:
            seen.setdefault(id(value), len(seen))
    digest.update(
        repr([(name, seen.get(id(v))) for name, v in zip(graph.output_names, graph.outputs, strict=True)]).encode()
    )
    return digest.hexdigest()


def source_hash() -> str:
    """A hash of the sources that a verdict depends on."""
    digest = hashlib.blake2b(digest_size=20)
    for name in _SOURCES:
        root = _ENGINE / name
        for path in [root] if root.is_file() else sorted((*root.rglob("*.py"), *root.rglob("*.cuh"))):
            digest.update(f"{path.relative_to(_ENGINE).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class Verdicts:
    """Verdicts on disk (in no folder: nowhere), a small JSON file each. Whatever is wrong with a file counts as not
    having it. A verdict that was not measured is not kept: it would stand for one from then on."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def read(self, *parts: str) -> Verdict | None:
        """The verdict that depends on all of `parts`."""
        if self._folder is None:
            return None
        try:
            found = json.loads(_file(self._folder, parts).read_text(encoding="utf-8"))
            precision = Precision(found["precision"])
            error = float(found["error"])
            rejected = tuple(str(line) for line in found["rejected"])
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return Verdict(precision, error, rejected) if precision in CANDIDATES else None

    def write(self, verdict: Verdict, *parts: str) -> None:
        """Keep the verdict that depends on all of `parts`."""
        if self._folder is None or verdict.error is None:
            return
        text = json.dumps({"precision": verdict.precision.value, "error": verdict.error, "rejected": verdict.rejected})
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Written beside, then renamed: two processes that decide at once never read half a file.
            with tempfile.NamedTemporaryFile("w", dir=self._folder, delete=False, encoding="utf-8") as file:
                file.write(text)
            os.replace(file.name, _file(self._folder, parts))
        except OSError:
            return


def _file(folder: Path, parts: Iterable[str]) -> Path:
    return folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.json"
