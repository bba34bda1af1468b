"""Steps that the host computes between two graphs of a plan: operators without a kernel (`Opaque`). Used by
`program.py`.

Their operands come to pinned memory and their results go back to the device on the stream that computes, so a step sees
what the graph before it has written, and the graph behind it what the step has. The queueing thread waits meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import cupy
import numpy as np

from engine.ir.ops import Opaque
from engine.plan.plan import Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.kernel import ALIGNMENT, Pointer, ceildiv, content, pointer_to
from engine.targets.cuda.memory import pinned_bytes
from engine.targets.host import HostOperator


class HostStep:
    """One step, with pinned memory for its operands and results. The plan lays both out densely."""

    def __init__(self, index: int, step: Step) -> None:
        assert isinstance(step.op, Opaque)
        self.index = index
        self.nanoseconds = 0
        """Of all runs: from the first copy out to the result's being on its way back."""
        self._step = step
        self._operator = HostOperator(step.op)
        self._memory: np.ndarray | None = None
        self._offsets: list[int] = []
        self.nbytes = 0
        for tensor in (*step.inputs, *step.outputs):
            self._offsets.append(self.nbytes)
            self.nbytes += ceildiv(max(tensor.nbytes, 1), ALIGNMENT) * ALIGNMENT

    def run(self, address: Callable[[Pointer], int], stream: cupy.cuda.Stream) -> None:
        """Compute the step after what the stream has been given so far, before what comes next. Raises EngineError
        where the operator fails."""
        start = time.perf_counter_ns()
        if self._memory is None:
            self._memory = pinned_bytes(max(self.nbytes, 1))
        step, count = self._step, len(self._step.inputs)
        places = [self._place(i, tensor) for i, tensor in enumerate((*step.inputs, *step.outputs))]
        inputs = []
        for tensor, place in zip(step.inputs, places, strict=False):
            if tensor.buffer.data is None:
                _copy(place, address(pointer_to(tensor)), cupy.cuda.runtime.memcpyDeviceToHost, stream)
                inputs.append(place)
            else:
                inputs.append(content(tensor))
        stream.synchronize()
        # What a run before has put into the results' memory is on the device by now: those copies were queued earlier.
        results = self._operator.run(inputs)
        for tensor, place, result in zip(step.outputs, places[count:], results, strict=True):
            place[...] = result
            _copy(place, address(pointer_to(tensor)), cupy.cuda.runtime.memcpyHostToDevice, stream)
        self.nanoseconds += time.perf_counter_ns() - start

    def _place(self, i: int, tensor: Tensor) -> np.ndarray:
        assert self._memory is not None
        start = self._offsets[i]
        return self._memory[start : start + tensor.nbytes].view(tensor.dtype.numpy).reshape(tensor.shape)


def _copy(place: np.ndarray, device: int, kind: int, stream: cupy.cuda.Stream) -> None:
    if place.nbytes:
        host = int(place.ctypes.data)
        to, source = (host, device) if kind == cupy.cuda.runtime.memcpyDeviceToHost else (device, host)
        cupy.cuda.runtime.memcpyAsync(to, source, place.nbytes, kind, stream.ptr)
