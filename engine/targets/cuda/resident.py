"""A plan with inputs and outputs of its own in device memory: what `Model.bind` gives on a GPU.

An ordinary executable keeps inputs and outputs in the region that all plans of a model share, and copies them there
and back for every run. This one has CuPy arrays instead; a launch moves nothing, and waits only where it is told to.
"""

from __future__ import annotations

from collections.abc import Mapping

import cupy
import numpy as np

from engine.ir.dtype import DType
from engine.plan.plan import Plan
from engine.plan.tensor import BufferKind, Tensor
from engine.targets.cuda.kernel import Pointer
from engine.targets.cuda.target import CudaTarget, Executable


class ResidentExecutable(Executable):
    """A plan on arrays of its own. `inputs` and `outputs` are CuPy arrays by name (bfloat16 as its bits)."""

    def __init__(self, target: CudaTarget, plan: Plan) -> None:
        self._arrays: dict[int, cupy.ndarray] = {}
        super().__init__(target, plan)
        self.inputs = {name: self._arrays[id(tensor.buffer)] for name, tensor in plan.inputs.items()}
        self.outputs = {name: self._arrays[id(tensor.buffer)] for name, tensor in plan.outputs.items()}
        self._before = cupy.cuda.Event(disable_timing=True)
        self._after = cupy.cuda.Event(disable_timing=True)

    def _place(self, tensors: Mapping[str, Tensor], start: int) -> int:
        """Give each tensor an array; nothing lies in the shared region."""
        for tensor in tensors.values():
            dtype = np.dtype(np.uint16) if tensor.dtype is DType.BF16 else tensor.dtype.numpy
            self._arrays[id(tensor.buffer)] = cupy.zeros(tensor.shape, dtype)
        return start

    def address(self, pointer: Pointer) -> int:
        """Where a pointer points to on the device."""
        if pointer.buffer.kind in (BufferKind.INPUT, BufferKind.OUTPUT):
            return int(self._arrays[id(pointer.buffer)].data.ptr) + pointer.offset
        return super().address(pointer)

    def launch(self, stream: object = None) -> None:
        """Run once, after what the caller's stream (without one: CuPy's current one) has been given so far.

        Without `stream` this waits for the result; with one, later work of that stream does.
        """
        device = self._target.device
        with self._target.lock, device.errors(), device.current():
            caller = stream if isinstance(stream, cupy.cuda.Stream | cupy.cuda.ExternalStream) else None
            if self._pending_sample and self._after.done:
                self._collect_stamps()
            self._before.record(caller or cupy.cuda.get_current_stream())
            device.stream.wait_event(self._before)
            super().launch()
            self._after.record(device.stream)
            if caller is not None:
                caller.wait_event(self._after)
            else:
                self._after.synchronize()
                self._collect_stamps()

    def close(self) -> None:
        """Forget graphs and arrays."""
        super().close()
        self._arrays.clear()
