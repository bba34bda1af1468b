"""Running on packed tokens: what the host makes of the mask for each batch. Called by `engine.model`.

Which graph runs is decided for every batch anew: the mask has to be what the proof (`engine.passes.unpad`) rests on,
ones and then zeros in every row, at least one of the former; and there has to be enough padding to leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine.passes.traits import PackedAttention
from engine.passes.unpad import Unpadded

_STEPS = 16
"""Numbers of tokens between a power of two and the next: of so many plans a new one (10 ms) is seldom made, and of the
tokens computed a seventeenth at most, and on average a forty-fifth, belongs to nobody."""
_LEAST_STEP = 8
LEAST_SAVING = 1 / 32
"""Of the rows of the padded batch, those to be left out before packing pays. Looking at the mask, looking up the
inputs' rows and unpacking the results take 1 % of a run at 16 tokens and half a percent from 256 on (MiniLM on one
core, the packed graph beside the padded one at as many tokens)."""


def token_bucket(tokens: int) -> int:
    """`tokens` rounded up to a number that plans are made for."""
    step = max(_LEAST_STEP, (1 << (tokens - 1).bit_length()) // (2 * _STEPS)) if tokens > 1 else _LEAST_STEP
    return -(-tokens // step) * step


@dataclass(frozen=True)
class Batch:
    """What to run for some feeds: arrays and sizes of the packed graph, or, where `packed` is False, of the padded one.
    `lengths`: the real tokens of every sequence, None where the mask is not one to pack by."""

    arrays: Mapping[str, np.ndarray]
    sizes: Mapping[str, int]
    packed: bool
    lengths: np.ndarray | None = None


class Packer:
    """Makes batches for the packed graph of one model, on a target with the attention `kernel`."""

    def __init__(self, unpadded: Unpadded, kernel: PackedAttention) -> None:
        self._unpadded = unpadded
        self._kernel = kernel

    def batch(
        self, arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int], least_saving: float = LEAST_SAVING
    ) -> Batch:
        """The batch of `arrays`, whose sizes are `sizes`: on packed tokens where the mask allows it and that saves
        `least_saving` of the rows."""
        mask = arrays[self._unpadded.mask]
        lengths = prefix_lengths(mask) if mask.size else None
        if lengths is None:
            return Batch(arrays, sizes, False)
        tokens = token_bucket(int(lengths.sum()))
        if not self._pays(len(lengths), mask.size, tokens, least_saving):
            return Batch(arrays, sizes, False, lengths)
        hidden = self._hidden(mask, lengths, tokens)
        given = {self._unpadded.hidden[kind]: array for kind, array in hidden.items() if kind in self._unpadded.hidden}
        return Batch({**arrays, **given}, {**sizes, self._unpadded.tokens: tokens}, True, lengths)

    def computed_tokens(self, rows: int, width: int, tokens: int) -> int:
        """How many tokens are computed of a batch [rows, width] of which so many are real."""
        rounded = token_bucket(tokens)
        return rounded if self._pays(rows, rows * width, rounded, LEAST_SAVING) else rows * width

    def _pays(self, sequences: int, padded: int, tokens: int, least_saving: float) -> bool:
        """Whether so many tokens run packed instead of the padded ones."""
        possible = self._kernel.sequences is None or sequences <= self._kernel.sequences
        return possible and tokens <= padded * (1 - least_saving)

    def clear(self, outputs: Mapping[str, np.ndarray], batch: Batch) -> None:
        """Put into the outputs of a padded run what a packed one has at padded positions, so that a row has the same
        result whatever it shares its batch with."""
        lengths = batch.lengths
        if batch.packed or lengths is None:
            return
        sequence = batch.arrays[self._unpadded.mask].shape[1]
        if int(lengths.min()) == sequence:
            return
        padded = np.arange(sequence) >= lengths[:, None]
        for name, (axes, fill) in self._unpadded.shown.items():
            array = outputs[name]
            if len(axes) == 1:
                shape = (*array.shape[: axes[0]], len(lengths), sequence, *array.shape[axes[0] + 1 :])
                array, axes = array.reshape(shape), (axes[0], axes[0] + 1)
            np.moveaxis(array, axes, (0, 1))[padded] = fill

    @staticmethod
    def _hidden(mask: np.ndarray, lengths: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
        """The hidden inputs, as `Unpadded` says. Tokens that belong to no sequence are copies of the first one, so that
        whatever is computed of them is as finite; nobody reads it."""
        batch, sequence = mask.shape
        real = np.flatnonzero(mask)
        starts = np.zeros(batch + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        rows = np.zeros(tokens, np.int64)
        rows[: real.size] = real
        positions = np.zeros(tokens, np.int64)
        np.remainder(real, sequence, out=positions[: real.size])
        places = np.zeros(batch * sequence, np.int64)
        places[real] = np.arange(real.size)
        return {"rows": rows, "positions": positions, "places": places.reshape(batch, sequence), "starts": starts}


def prefix_lengths(mask: np.ndarray) -> np.ndarray | None:
    """The number of ones in every row of `mask`, int64; None where a row is anything else than at least one 1 and then
    zeros."""
    lengths: np.ndarray = np.count_nonzero(mask, axis=1)
    prefixes = np.arange(mask.shape[1]) < lengths[:, None]
    return lengths if lengths.all() and (mask == prefixes).all() else None
