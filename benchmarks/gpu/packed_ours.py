"""Our side of ``python -m benchmarks packed``: a model bound on packed tokens and padded, on arrays of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cupy
import numpy as np
import torch

import engine
from benchmarks.cases.packed import PackedCase
from benchmarks.gpu.executables import limit_compiler
from benchmarks.gpu.pace import Pace, pace_of
from benchmarks.gpu.real_tokens import Real
from benchmarks.gpu.timing import CallContender
from benchmarks.results import Ceilings
from engine.model import BoundModel, Model


class OurModels:
    """One of our models, on packed tokens and not, in fp16 whatever `auto` would choose: the peers are."""

    def __init__(self, path: Path, threads: int) -> None:
        self.packed, self.padded = (
            engine.load(path, device="cuda:0", precision="fp16", strict=True, packed=packed) for packed in (True, False)
        )
        for model in (self.packed, self.padded):
            limit_compiler(model, threads)
        self._bound: dict[tuple[str, bool], BoundModel | Exception] = {}

    def prepare(self, case: PackedCase) -> None:
        """Bind a case both ways: its kernels are compiled and loaded. What fails is said by `contender`."""
        for is_packed in (True, False):
            try:
                self._bound[case.name, is_packed] = self._bind(case, is_packed)
            except Exception as problem:
                self._bound[case.name, is_packed] = problem

    def _bind(self, case: PackedCase, is_packed: bool) -> BoundModel:
        feeds = case.feeds()
        if is_packed:
            sizes, arrays = packed_of(self.packed, feeds)
            bound = self.packed.bind(sizes)
        else:
            arrays = feeds
            bound = self.padded.bind(case.sizes)
        for name, array in bound.inputs.items():
            array.set(arrays[name])
        return bound

    def contender(self, case: PackedCase, real: Real, is_packed: bool) -> OurContender:
        bound = self._bound[case.name, is_packed]
        if isinstance(bound, Exception):
            raise bound
        return OurContender(bound, real, is_packed, self.pace(case))

    def pace(self, case: PackedCase) -> Pace:
        """That of all contenders of a case: of the padded plan, which takes the most."""
        return pace_of(self.padded.plan(case.sizes).steps)

    def tokens(self, case: PackedCase) -> int:
        """How many tokens the packed plan computes."""
        sizes, _ = packed_of(self.packed, case.feeds())
        return sizes[str(self.packed.packed_size)]

    def floor(self, case: PackedCase, ceilings: Ceilings) -> float | None:
        """Microseconds that the steps of the packed plan take at least; None without a plan."""
        if isinstance(self._bound[case.name, True], Exception):
            return None
        return ceilings.plan_floor_us(self.packed.plan(packed_of(self.packed, case.feeds())[0]))


def packed_of(model: Model, feeds: Mapping[str, np.ndarray]) -> tuple[Mapping[str, int], Mapping[str, np.ndarray]]:
    """Sizes and inputs of the packed plan for some feeds. Raises RuntimeError where the model has none."""
    batch = model.pack(feeds)
    if batch is None:
        raise RuntimeError(f"not on packed tokens: {model.why_padded or 'the mask is none to pack by'}")
    return batch.sizes, batch.arrays


class OurContender(CallContender):
    """A bound model on its inputs as they lie in device memory."""

    def __init__(self, bound: BoundModel, real: Real, is_packed: bool, pace: Pace) -> None:
        super().__init__(self._queue, real.of_padded, pace)
        self._bound = bound
        self._real = real
        self._is_packed = is_packed
        self.worst = float("inf")
        """The relative error of the real token that is furthest off, once `error` has looked."""

    def error(self) -> float:
        """The relative error at real tokens, the outputs poisoned before; infinite where a packed run leaves anything
        else than zeros at padded positions."""
        for array in self._bound.outputs.values():
            array.fill(np.nan)
        self._bound.launch()
        (output,) = (torch.from_numpy(array.get()) for array in self._bound.outputs.values())
        found = self._real.taken(output)
        self.worst = self._real.worst(found)
        if self._is_packed and bool(output[~self._real.mask].any()):
            return float("inf")
        return self._real.of_tokens(0, found)

    def _queue(self) -> None:
        self._bound.launch(cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream))
