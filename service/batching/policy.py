"""What may share a batch: the axes of a model, the group of a row, the cost of a request. Pure functions, no state, no
thread.

Called by the queue (grouping, cost) and by the engine worker at load (axes). A model whose first dim is not one symbol
shared by all inputs and outputs is never batched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.workers.messages import BatchingMode, BatchingOptions, TensorInfo

MASK_NAMES = ("attention_mask", "input_mask", "mask")

_LENGTH_STEP = 8

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BatchAxes:
    """The axes of a model that batching needs.

    `sequence` is the symbol of axis 1 of the token inputs (None for models without one), of which the model takes
    `longest` at most; `sequence_outputs` are, per output name, the axes that carry it. Where rows are packed, `mask` is
    the input that tells tokens from padding, and `packed_tokens` says how many a run of so many rows computes, of a
    width, with so many tokens of their own.
    """

    mode: BatchingMode
    sequence: str | None
    sequence_outputs: dict[str, tuple[int, ...]]
    reason: str
    longest: int | None = None
    mask: str | None = None
    packed_tokens: Callable[[int, int, int], int] | None = None

    def packed(self, mask: str, packed_tokens: Callable[[int, int, int], int]) -> "BatchAxes":
        """The same model with rows of any length side by side."""
        reason = f"rows of any length side by side: what '{mask}' hides is not computed"
        return replace(self, mode=BatchingMode.PACKED, reason=reason, mask=mask, packed_tokens=packed_tokens)

    def computed(self, packed: bool, rows: int, width: int, tokens: int) -> int:
        """What a run computes of rows of so many tokens altogether, handed over in a common length."""
        if packed and self.packed_tokens is not None:
            return self.packed_tokens(rows, width, tokens)
        return rows * width

    def without_padding(self, reason: str) -> "BatchAxes":
        """The same model with rows of equal length only."""
        return replace(self, mode=BatchingMode.ROWS, reason=reason)

    def without_batching(self, reason: str) -> "BatchAxes":
        """The same model, one request at a time."""
        return replace(self, mode=BatchingMode.NONE, reason=reason)


def find_axes(inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> BatchAxes:
    """Read from the specs how a model may be batched; the worker's probe may still narrow it."""
    sequence = _sequence_symbol(inputs)
    sequence_outputs = {
        spec.name: tuple(axis for axis, dim in enumerate(spec.shape) if axis > 0 and dim == sequence)
        for spec in outputs
    }
    axes = BatchAxes(BatchingMode.NONE, sequence, sequence_outputs, "")
    symbol = inputs[0].shape[0] if inputs and inputs[0].shape else None
    for kind, specs in (("input", inputs), ("output", outputs)):
        for spec in specs:
            if not spec.shape or spec.shape[0] != symbol or not isinstance(symbol, str):
                shared = f", not '{symbol}'" if isinstance(symbol, str) else ""
                return axes.without_batching(
                    f"one request a run: the first dim of {kind} '{spec.name}' {_first(spec)}{shared}; "
                    "batching needs one open dim that comes first everywhere"
                )
    if any(symbol in spec.shape[1:] for spec in (*inputs, *outputs)):
        return axes.without_batching(f"dim '{symbol}' is the first dim and also another one")
    if sequence is None:
        return axes.without_padding(f"rows along '{symbol}'")
    known = {dim for spec in inputs for dim in spec.shape if isinstance(dim, str)}
    if any(isinstance(dim, str) and dim not in known for spec in outputs for dim in spec.shape):
        return axes.without_padding("rows of equal length: an output has a dim that no input has")
    if not any(spec.name in MASK_NAMES for spec in inputs):
        return axes.without_padding("rows of equal length: there is no mask input to pad under")
    return replace(axes, mode=BatchingMode.PADDED, reason=f"rows along '{symbol}', padded along '{sequence}'")


def _first(spec: TensorInfo) -> str:
    return f"is {spec.shape[0]}" if spec.shape else "does not exist"


def _sequence_symbol(inputs: Sequence[TensorInfo]) -> str | None:
    """The symbol at axis 1 of every input, where all are integer (batch, sequence) tensors."""
    symbols = {spec.shape[1] if len(spec.shape) == 2 and spec.dtype.kind in "iub" else None for spec in inputs}
    symbol = next(iter(symbols)) if len(symbols) == 1 else None
    return symbol if isinstance(symbol, str) else None


def prefix_lengths(mask: NDArray[Any]) -> tuple[int, ...] | None:
    """The number of ones in each row of a mask; None where a row is anything else than ones, at least one, and then
    zeros."""
    if not mask.size:
        return None
    real = mask == 1
    ones = np.count_nonzero(real, axis=1)
    ends = mask.shape[1] - np.argmax(mask[:, ::-1] != 0, axis=1)
    prefixes = ones.all() and np.array_equal(ones, ends) and np.array_equal(real, mask)
    return tuple(ones.tolist()) if prefixes else None


def width_of(packed: bool, longest: int, options: BatchingOptions, axes: BatchAxes) -> int:
    """The common length in which rows are handed over. That of packed ones costs nothing that is computed, so it may be
    as wide as its bucket, and makes few plans. What is longer than the model takes is for the engine to refuse."""
    if axes.mode is BatchingMode.ROWS:
        return longest
    width = bucket_of(longest, options.buckets) if packed else padded_width(longest, options.buckets)
    return width if axes.longest is None else max(longest, min(width, axes.longest))


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket edge that holds `length`; above the last edge, the next multiple of it."""
    for edge in buckets:
        if length <= edge:
            return edge
    last = buckets[-1] if buckets else 1
    return -(-length // last) * last


def padded_width(longest: int, buckets: Sequence[int]) -> int:
    """The common length of a batch whose longest row is `longest`: the next multiple of 8, within its bucket.

    Every new shape costs the engine a plan: 15 to 40 ms for a six-layer encoder on two cores, where seven tokens run in
    1.2 ms (measured through `Model.run`). A few tokens of padding are cheaper than a plan per length.
    """
    return min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, bucket_of(longest, buckets))


def capacity(options: BatchingOptions, axes: BatchAxes) -> int:
    """The cost that may wait for a model: tokens for sequence models, else rows."""
    return options.queue_batches * (options.max_batch if axes.sequence is None else options.max_tokens)
