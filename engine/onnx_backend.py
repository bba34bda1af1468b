"""The engine as an `onnx.backend.base.Backend`, for the ONNX conformance suite and for tools that speak that
interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx.backend.base import Backend, BackendRep, DeviceType
from onnx.backend.base import Device as OnnxDevice

from engine.errors import UnsupportedOp
from engine.loading import load
from engine.model import Model


class PreparedModel(BackendRep):
    """A loaded model behind the interface of `onnx.backend`.

    The engine wants to know shapes when it loads a model. Where an input decides one (the target of a Reshape), the
    model is loaded when it is run, with that input as a constant; the backend's interface has no better place for it.
    """

    def __init__(self, proto: onnx.ModelProto, **options: Any) -> None:
        self._proto = proto
        self._options = options
        constants = {tensor.name for tensor in proto.graph.initializer}
        self._names = [info.name for info in proto.graph.input if info.name not in constants]
        self._model: Model | None = None
        try:
            self._model = load(proto.SerializeToString(), **options)
        except UnsupportedOp:
            if not self._names:
                raise

    def run(self, inputs: Any, **kwargs: Any) -> tuple[np.ndarray, ...]:
        """Run on a sequence of arrays in the order of the model's inputs, one array, or a mapping by name."""
        if isinstance(inputs, Mapping):
            feeds = dict(inputs)
        else:
            arrays: Sequence[Any] = inputs if isinstance(inputs, (list, tuple)) else [inputs]
            feeds = dict(zip(self._names, arrays, strict=True))
        if self._model is not None:
            return tuple(self._model.run(feeds).values())
        with self._loaded_for(feeds) as model:
            return tuple(model.run({spec.name: feeds[spec.name] for spec in model.inputs}).values())

    def _loaded_for(self, feeds: Mapping[str, Any]) -> Model:
        """The model with scalars and vectors among the feeds as constants: those after the first input, where an
        operator has its parameters, or, where that is not enough, all."""
        small = [name for name in self._names if isinstance(feeds[name], np.ndarray) and feeds[name].ndim <= 1]
        try:
            return self._with_constants([name for name in small if name != self._names[0]], feeds)
        except UnsupportedOp:
            return self._with_constants(small, feeds)

    def _with_constants(self, names: Sequence[str], feeds: Mapping[str, Any]) -> Model:
        proto = onnx.ModelProto()
        proto.CopyFrom(self._proto)
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(feeds[name], name) for name in names)
        return load(proto.SerializeToString(), **self._options)


class TilewaveBackend(Backend):
    """`prepare` loads a ModelProto with `engine.load`. Raises the errors of `engine.load`, where inputs decide shapes
    those of an operator without a kernel only when it runs."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> PreparedModel:
        return PreparedModel(model, device=_device_name(device), **kwargs)

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
