"""Named weights of a checkpoint, taken out one by one with their shapes checked. Used by the builders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from models.errors import FormatError

FloatArray = npt.NDArray[np.float32]


class TensorSource(Protocol):
    """Where a builder takes its weights from."""

    def take(self, name: str, *shape: int) -> FloatArray:
        """float32 tensor ``name`` of exactly ``shape``."""
        ...


class Weights:
    """A checkpoint on its way into a graph."""

    def __init__(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        self._tensors = tensors
        self._left = set(tensors)

    def take(self, name: str, *shape: int) -> FloatArray:
        """Return float32 tensor ``name`` of exactly ``shape``.

        Raises:
            FormatError: it is missing, or has another shape or dtype.
        """
        if name not in self._tensors:
            raise FormatError(f"the checkpoint has no tensor {name!r}")
        tensor = self._tensors[name]
        if tensor.shape != shape or tensor.dtype != np.float32:
            raise FormatError(f"tensor {name!r} is {tensor.dtype}{list(tensor.shape)}, expected float32{list(shape)}")
        self._left.discard(name)
        return tensor

    def expect_left(self, *suffixes: str) -> None:
        """Check that every tensor not taken ends in one of ``suffixes``: nothing of the model was overlooked.

        Raises:
            FormatError: another tensor is left.
        """
        unknown = sorted(name for name in self._left if not name.endswith(suffixes))
        if unknown:
            raise FormatError(f"the checkpoint holds tensors that the model has no place for: {', '.join(unknown[:5])}")
