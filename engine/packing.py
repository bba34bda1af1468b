"""Running on packed tokens: what the host makes of the mask for each batch. Called by `engine.model`.

Which graph runs is decided for every batch anew: the mask has to be what the proof (`engine.passes.unpad`) rests on, ones
and then zeros in every row, at least one of the former; and there has to be enough padding to leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engine.passes.unpad import Unpadded

_STEPS = 8
"""Numbers of tokens between a power of two and the next: of so many plans a new one is seldom made, and of the tokens
computed a ninth at most, and on average a twentieth, belongs to nobody."""
_LEAST_STEP = 8
LEAST_SAVING = 0.1
"""Of the rows of the padded batch, those to be left out before packing pays: what looking at the mask, looking up the
inputs' rows and unpacking the results take (docs/performance.md)."""


def token_bucket(tokens: int) -> int:
    """`tokens` rounded up to a number that plans are made for."""
    step = max(_LEAST_STEP, (1 << (tokens - 1).bit_length()) // (2 * _STEPS)) if tokens > 1 else _LEAST_STEP
    return -(-tokens // step) * step


@dataclass(frozen=True)
class Batch:
    """A batch on packed tokens: `arrays` are the feeds and the hidden inputs, `sizes` those of the packed graph."""

    arrays: dict[str, np.ndarray]
    sizes: dict[str, int]
    real_tokens: int


class Packer:
    """Makes batches for the packed graph of one model. `most_sequences`: in one batch, None: any number."""

    def __init__(self, unpadded: Unpadded, most_sequences: int | None) -> None:
        self._unpadded = unpadded
        self._most = most_sequences

    def pack(
        self, arrays: Mapping[str, np.ndarray], sizes: Mapping[str, int], least_saving: float = LEAST_SAVING
    ) -> Batch | None:
        """The batch of `arrays`, whose sizes are `sizes`, on packed tokens; None where it has to run padded, or would
        save less than `least_saving` of the rows."""
        mask = arrays[self._unpadded.mask]
        batch, sequence = mask.shape
        if not mask.size or (self._most is not None and batch > self._most):
            return None
        lengths = prefix_lengths(mask)
        if lengths is None:
            return None
        total = int(lengths.sum())
        tokens = token_bucket(total)
        if tokens > mask.size * (1 - least_saving):
            return None
        hidden = self._hidden(lengths, sequence, tokens)
        given = {self._unpadded.hidden[kind]: array for kind, array in hidden.items() if kind in self._unpadded.hidden}
        return Batch({**arrays, **given}, {**sizes, self._unpadded.tokens: tokens}, total)

    @staticmethod
    def _hidden(lengths: np.ndarray, sequence: int, tokens: int) -> dict[str, np.ndarray]:
        """The hidden inputs, as `Unpadded` says. Tokens that belong to no sequence are copies of the first one, so that
        whatever is computed of them is as finite; nobody reads it."""
        batch, total = len(lengths), int(lengths.sum())
        starts = np.zeros(batch + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        first = np.arange(batch, dtype=np.int64) * sequence - starts[:-1]
        numbers = np.arange(total, dtype=np.int64)
        rows = np.zeros(tokens, np.int64)
        rows[:total] = numbers + np.repeat(first, lengths)
        positions = np.zeros(tokens, np.int64)
        positions[:total] = numbers - np.repeat(starts[:-1], lengths)
        places = np.zeros(batch * sequence, np.int64)
        places[rows[:total]] = numbers
        return {"rows": rows, "positions": positions, "places": places.reshape(batch, sequence), "starts": starts}


def prefix_lengths(mask: np.ndarray) -> np.ndarray | None:
    """The number of ones in every row of `mask`, int64; None where a row is anything else than at least one 1 and then
    zeros."""
    real = mask if mask.dtype == np.bool_ else mask != 0
    lengths = np.count_nonzero(real, axis=1)
    # As many ones as the place of the last one says: they come first.
    last = mask.shape[1] - np.argmax(real[:, ::-1], axis=1)
    if not lengths.all() or not np.array_equal(last, lengths):
        return None
    if mask.dtype != np.bool_ and not np.array_equal(mask, real):
        return None
    return lengths
