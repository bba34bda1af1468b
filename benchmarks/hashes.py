"""Hashes of the sources that a row's kernels depend on. A row with another hash than the present sources is stale.
Comments and line breaks of kernels count for nothing.

A GPU kernel's row depends on the complete sources of the kernels that the case launches, which hold their tiles, types
and expressions; a row of a model or of the server on all kernels and passes, and one on packed tokens on the packer as
well; a row of the CPU on the code generators and passes; a row of an export on its file, the frontend and the packer,
too.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pathlib import Path

from benchmarks import cases
from benchmarks.results import Device

_ENGINE = Path(__file__).parent.parent / "engine"
FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
_SHARED = ("ir", "passes", "plan")
_INSPECTS = ("gate.py", "machine_code.py")  # what is compiled, and makes none of it
_DIGITS = 16
_COMMENT = re.compile(r"//[^\n]*")
_WHOLE = (
    cases.models.ModelCase, cases.accuracy.AccuracyCase, cases.memory.MemoryCase, cases.ready.ReadyCase,
    cases.metrics.MetricsCase,
)  # fmt: skip


def kernel_hash(device: Device, case: cases.Case) -> str:
    """The hash that a row of `case` on `device` has with the present sources. Raises EngineError where the case has no
    kernel, ImportError for a GPU's kernels without the packages of the extra `kernels`."""
    if isinstance(case, cases.exports.ExportCase):
        return export_hash(case)
    if not device.architecture:
        return tree_hash("targets/cpu")
    if isinstance(case, cases.packed.PackedCase):
        return hash_texts([tree_hash("targets/cuda"), _packer()])
    if isinstance(case, _WHOLE):
        return tree_hash("targets/cuda")
    from benchmarks.gpu import steps  # which needs NVRTC's bindings

    assert isinstance(case, steps.KERNEL_CASES)
    sources = steps.kernel_sources(case, steps.context(device.architecture, device.multiprocessors))
    return hash_texts([code_of(text) for text in sources])


def export_hash(case: cases.exports.ExportCase, folder: Path = FIXTURES) -> str:
    """The hash of what an export's row depends on. Where its file is missing, another than any row has."""
    files = [folder / f"{case.name}{suffix}" for suffix in (".onnx", ".npz")]
    content = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]
    return hash_texts([tree_hash("targets/cpu"), tree_hash("frontend"), _packer(), *content])


def _packer() -> str:
    return (_ENGINE / "packing.py").read_text(encoding="utf-8")


@cache
def tree_hash(target: str, engine: Path = _ENGINE) -> str:
    """The hash of a target's sources, with those of the graph, the passes and the plan."""
    files = [
        path
        for folder in (*_SHARED, target)
        for path in sorted((engine / folder).rglob("*"))
        if path.suffix in (".py", ".cuh") and path.name not in _INSPECTS
    ]
    return hash_texts([f"{path.relative_to(engine).as_posix()}\0{_content(path)}" for path in files])


def _content(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return code_of(text) if path.suffix == ".cuh" else text


def code_of(kernel: str) -> str:
    """A kernel's text without comments, all white space a blank. No string of a kernel has two slashes."""
    return " ".join(_COMMENT.sub("", kernel).split())


def hash_texts(texts: list[str]) -> str:
    """The hash of some texts, in any order."""
    return hashlib.sha256("\0".join(sorted(set(texts))).encode()).hexdigest()[:_DIGITS]
