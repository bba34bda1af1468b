"""The engine as an `onnx.backend.base.Backend`, for the ONNX conformance suite and for tools that speak that
interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend, BackendRep, DeviceType
from onnx.backend.base import Device as OnnxDevice

from engine.loading import load
from engine.model import Model


class PreparedModel(BackendRep):
    """A loaded model behind the interface of `onnx.backend`."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def run(self, inputs: Any, **kwargs: Any) -> tuple[np.ndarray, ...]:
        """Run on a sequence of arrays in the order of the model's inputs, one array, or a mapping by name."""
        if isinstance(inputs, Mapping):
            feeds = dict(inputs)
        else:
            arrays: Sequence[Any] = inputs if isinstance(inputs, (list, tuple)) else [inputs]
            feeds = {spec.name: array for spec, array in zip(self._model.inputs, arrays, strict=True)}
        return tuple(self._model.run(feeds).values())


class TilewaveBackend(Backend):
    """`prepare` loads a ModelProto with `engine.load`."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> PreparedModel:
        return PreparedModel(load(model.SerializeToString(), device=_device_name(device), **kwargs))

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any) -> Any:
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return bool(OnnxDevice(device).type == DeviceType.CPU)


def _device_name(device: str) -> str:
    parsed = OnnxDevice(device)
    return "cpu" if parsed.type == DeviceType.CPU else f"cuda:{parsed.device_id}"


prepare = TilewaveBackend.prepare
run_model = TilewaveBackend.run_model
supports_device = TilewaveBackend.supports_device
