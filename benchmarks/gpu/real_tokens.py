"""Results at the real tokens of a batch beside their reference; what stands at padded positions is nobody's. Needs
PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Real:
    """The reference at the real tokens of a batch: float64 `expected` [tokens, hidden], row by row; `mask` bool
    [batch, sequence]."""

    expected: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, expected: np.ndarray, feeds: Mapping[str, np.ndarray]) -> Real:
        """`expected`: [batch, sequence, hidden]."""
        mask = feeds["attention_mask"].astype(bool)
        return cls(torch.from_numpy(expected[mask]), torch.from_numpy(mask))

    def of_padded(self, _: int, result: torch.Tensor) -> float:
        """The relative error at real tokens of a result [batch, sequence, hidden]; infinite for another shape."""
        return self.of_tokens(0, self.taken(result))

    def of_tokens(self, _: int, result: torch.Tensor) -> float:
        """The same of a result [tokens, hidden]."""
        return float(self._distances(result).norm() / self.expected.norm())

    def worst(self, result: torch.Tensor) -> float:
        """The relative error of the token that is furthest off, of a result [tokens, hidden]."""
        return float((self._distances(result) / self.expected.norm(dim=-1)).max())

    def taken(self, result: torch.Tensor) -> torch.Tensor:
        """The real tokens [tokens, hidden] of a result [batch, sequence, hidden]; none for another shape."""
        fits = result.shape[:2] == self.mask.shape
        return result[self.mask.to(result.device)] if fits else result.new_empty(0, self.expected.shape[-1])

    def _distances(self, result: torch.Tensor) -> torch.Tensor:
        """[tokens]: how far each is from the reference; infinitely where the shapes differ."""
        if result.shape != self.expected.shape:
            return self.expected.new_full(self.expected.shape[:1], torch.inf)
        return (result.cpu().double() - self.expected).norm(dim=-1)
