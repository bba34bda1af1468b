"""What the outputs of models are compared with: their twin in PyTorch on the GPU in float64, once it agrees with ONNX
Runtime on the CPU in fp32 at batch 1. ONNX Runtime alone would take minutes for large batches; and fp32 on a GPU is as
far from the truth as our own fp32 may be.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases.models import ModelCase
from benchmarks.gpu.networks import Network, network
from benchmarks.gpu.timing import full_precision

AGREEMENT = 5e-5  # relative L2 of fp32 from float64, through up to 53 convolutions
_ROWS = 32  # at a time: 128 rows of VGG-16 in float64 would take tens of GB


class References:
    """Makes references, keeping the twins between them. `threads` are those of ONNX Runtime."""

    def __init__(self, device: str = "cuda", threads: int = 0) -> None:
        self._device = device
        self._threads = threads
        self._twins: dict[str, Network] = {}

    def of(self, case: ModelCase, path: Path) -> dict[str, np.ndarray]:
        """The outputs of the model in the file `path`, in float64. Raises ValueError where the twin in PyTorch is
        another model."""
        if case.model not in self._twins:
            twin = network(case.model, path, self._device, torch.float64)
            first = replace(case, batch=1).feeds()
            expected = onnx_runtime(path, first, self._threads)[twin.output]
            error = float(np.linalg.norm(_exact(twin, first) - expected) / np.linalg.norm(expected))
            if not error <= AGREEMENT:
                raise ValueError(f"PyTorch's {case.model} differs from ONNX Runtime's by {error:.1e}")
            self._twins[case.model] = twin
        twin = self._twins[case.model]
        return {twin.output: _exact(twin, case.feeds())}


def onnx_runtime(path: Path, feeds: Mapping[str, np.ndarray], threads: int = 0) -> dict[str, np.ndarray]:
    """The outputs of ONNX Runtime on the CPU, in fp32. `threads`: 0 for all cores."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def free() -> None:
    """Give back what PyTorch keeps of the GPU's memory for later: others share it."""
    gc.collect()
    torch.cuda.empty_cache()


def _exact(twin: Network, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """The twin's output: no TF32, no fused attention, no search among algorithms that may be coarser."""
    full_precision()
    search, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.backends.mha.set_fastpath_enabled(False)
    rows = len(next(iter(feeds.values())))
    pieces: list[np.ndarray] = []
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            for first in range(0, rows, _ROWS):
                piece = {name: array[first : first + _ROWS] for name, array in feeds.items()}
                pieces.append(twin.call(*twin.arguments(piece)).cpu().numpy())
    finally:
        torch.backends.cudnn.benchmark = search
        torch.backends.mha.set_fastpath_enabled(True)
    return np.concatenate(pieces)
