"""The Tilewave inference engine: runs ONNX CNN and Transformer models in fused kernels of its own.

    import engine

    model = engine.load("model.onnx")
    outputs = model.run({"input": array})

The names below are the public API; everything else may change.
"""

from __future__ import annotations

from importlib import import_module

from engine.background import background
from engine.errors import DeviceError, DeviceLost, EngineError, ModelError, OutOfMemory, ShapeError, UnsupportedOp
from engine.loading import choose_device, load
from engine.model import BoundModel, Model
from engine.specs import DeviceInfo, KernelStat, PlanProfile, ProfileRow, StepStat, TensorSpec

__all__ = [
    "BoundModel",
    "DeviceError",
    "DeviceInfo",
    "DeviceLost",
    "EngineError",
    "KernelStat",
    "Model",
    "ModelError",
    "OutOfMemory",
    "PlanProfile",
    "ProfileRow",
    "ShapeError",
    "StepStat",
    "TensorSpec",
    "UnsupportedOp",
    "background",
    "choose_device",
    "load",
]


def __getattr__(name: str) -> object:
    # The ONNX backend imports onnx, which a caller of `load` alone need not wait for here.
    if name == "onnx_backend":
        return import_module("engine.onnx_backend")
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
