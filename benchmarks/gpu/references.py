"""What the outputs of models are compared with: ONNX Runtime on the CPU, in fp32.

For the architectures at large batches that takes minutes. Their reference is the twin in PyTorch on the GPU, in fp32
without TF32, once it agrees with ONNX Runtime at batch 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases.models import ARCHITECTURES, ModelCase
from benchmarks.gpu.networks import Network, network
from benchmarks.gpu.timing import full_precision

AGREEMENT = 5e-5  # relative L2 of two fp32 implementations, through up to 53 convolutions


class References:
    """Makes references, keeping the twins between them."""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self._twins: dict[str, Network] = {}

    def of(self, case: ModelCase, path: Path) -> dict[str, np.ndarray]:
        """The outputs of the model in the file `path`. Raises ValueError where the twin in PyTorch is another model."""
        if case.model not in ARCHITECTURES:
            return _onnx_runtime(path, case.feeds())
        if case.model not in self._twins:
            twin = network(case.model, path, self._device, torch.float32)
            first = replace(case, batch=1).feeds()
            expected = _onnx_runtime(path, first)[twin.output]
            error = float(np.linalg.norm(_exact(twin, first) - expected) / np.linalg.norm(expected))
            if not error <= AGREEMENT:
                raise ValueError(f"PyTorch's {case.model} differs from ONNX Runtime's by {error:.1e}")
            self._twins[case.model] = twin
        twin = self._twins[case.model]
        return {twin.output: _exact(twin, case.feeds())}


def _onnx_runtime(path: Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _exact(twin: Network, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    """The twin's output in fp32 proper: no TF32, no fused attention, no search among algorithms that may be coarser."""
    full_precision()
    search, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
            result: np.ndarray = twin.call(*twin.arguments(feeds)).cpu().numpy()
    finally:
        torch.backends.cudnn.benchmark = search
        torch.backends.mha.set_fastpath_enabled(True)
    return result
