"""From a file to a model that runs: read, rewrite for the target, check. Holds `engine.load`."""

from __future__ import annotations

import os
import time
from enum import Enum
from pathlib import Path

from engine.errors import DeviceError, UnsupportedOp
from engine.ir.graph import Graph
from engine.ir.ops import Opaque
from engine.model import PLAN_CACHE_BYTES, Model
from engine.targets.base import Target


class Precision(Enum):
    """Storage and compute type of the heavy operators."""

    AUTO = "auto"
    FP32 = "fp32"
    TF32 = "tf32"
    BF16 = "bf16"
    FP16 = "fp16"


def load(
    path: str | os.PathLike[str] | bytes,
    device: str = "auto",
    precision: str = "auto",
    strict: bool = False,
    threads: int | None = None,
    plan_cache_bytes: int = PLAN_CACHE_BYTES,
) -> Model:
    """Load an ONNX model and make it ready to run.

    `path` is an .onnx file (external data beside it is found) or its bytes. `device` is ``auto`` or ``cpu``.
    `precision` is ``auto`` or ``fp32`` on a CPU, where all float arithmetic is fp32 (fp64 stays fp64). With `strict`,
    an operator without a kernel of ours is refused instead of run through onnx.reference. `threads` bounds the CPU
    threads (default: every core this process may use). `plan_cache_bytes` bounds the plans kept ready for shapes seen
    before.

    Raises ModelError (not a valid model), UnsupportedOp (valid, but not runnable here), DeviceError (no such device or
    precision there), ValueError (an argument that means nothing).
    """
    # Imported here: the compiler and its dependencies are needed to load a model, not to name the engine's types.
    from engine import frontend, passes
    from engine.targets.cpu.target import CpuTarget

    start = time.perf_counter()
    target_name = _device(device)
    _check_precision(precision, target_name)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    source = path if isinstance(path, bytes) else Path(path)
    graph = passes.run(frontend.read(source), CpuTarget.traits)
    if strict:
        _refuse_opaque(graph)
    target: Target = CpuTarget(threads)
    model = Model(graph, target, plan_cache_bytes)
    model.load_seconds = time.perf_counter() - start
    return model


def _device(device: str) -> str:
    if device in ("auto", "cpu"):
        return "cpu"
    if device == "cuda" or device.startswith("cuda:"):
        raise DeviceError(f"device {device!r}: this version runs on the CPU only; use device='cpu' or 'auto'")
    raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<number>', not {device!r}")


def _check_precision(precision: str, device: str) -> None:
    try:
        chosen = Precision(precision)
    except ValueError:
        names = ", ".join(repr(item.value) for item in Precision)
        raise ValueError(f"precision must be one of {names}, not {precision!r}") from None
    if device == "cpu" and chosen not in (Precision.AUTO, Precision.FP32):
        raise DeviceError(f"the CPU computes in fp32; precision {precision!r} needs a GPU (use 'auto' or 'fp32')")


def _refuse_opaque(graph: Graph) -> None:
    for node in graph.nodes:
        if isinstance(node.op, Opaque):
            raise UnsupportedOp(
                f"node {node.origin!r}: operator {node.op.op_type} has no kernel and strict mode is on; "
                "load with strict=False to run it through onnx.reference on the host"
            )
