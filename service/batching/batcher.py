"""Rows of requests → the feeds of one run, and its outputs → the answers of the requests. Pure array work, no state.

Runs on the engine worker's threads, between `Scheduler.take` and the next one; `scatter` by one thread at a time,
because the parts of a request may be in two batches that run at once.
"""

import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.batching.policy import BatchAxes, Shape
from service.batching.queue import Batch, Entry, Taken
from service.workers.messages import BatchingMode, InferResult, LocalTensor

Array = NDArray[Any]


def assemble(batch: Batch) -> dict[str, Array]:
    """The inputs of a batch: (rows, …); sequence inputs are cut and zero-padded to (rows, batch.width)."""
    names = batch.parts[0].entry.arrays
    return {name: _gather(batch, name) for name in names}


def _gather(batch: Batch, name: str) -> Array:
    parts = batch.parts
    arrays = [part.entry.arrays[name] for part in parts]
    if len(arrays) == 1 and _is_whole(parts[0]) and (not batch.width or arrays[0].shape[1] == batch.width):
        return arrays[0]
    if not batch.width:
        pairs = zip(arrays, parts, strict=True)
        return np.concatenate([array if _is_whole(part) else array[part.rows] for array, part in pairs])
    out = np.zeros((batch.rows, batch.width, *arrays[0].shape[2:]), arrays[0].dtype)
    position = 0
    for array, part in zip(arrays, parts, strict=True):
        lengths = part.entry.lengths
        for row in part.rows:
            length = lengths[row]
            out[position, :length] = array[row, :length]
            position += 1
    return out


def _is_whole(part: Taken) -> bool:
    return len(part.rows) == part.entry.rows


def scatter(batch: Batch, outputs: Mapping[str, Array], axes: BatchAxes) -> list[Entry]:
    """Give each entry its rows of `outputs`, padding cut off; returns the entries that now have all their rows.

    A request whose rows ran in several batches gets one array per output; where its rows have unequal lengths, what
    lies beyond a row's own length along the sequence axis is zero.
    """
    sequences = axes.sequence_outputs
    position = 0
    for part in batch.parts:
        entry = part.entry
        end = position + len(part.rows)
        for name in entry.request.outputs:
            if axes.mode is BatchingMode.NONE:
                entry.outputs[name] = outputs[name]
            else:
                _place(entry, name, outputs[name][position:end], part.rows, sequences.get(name, ()))
        position = end
    for part in batch.parts:  # when all could be placed: a batch that fails runs again, and counts then
        part.entry.rows_done += len(part.rows)
    return [part.entry for part in batch.parts if part.entry.rows_done == part.entry.rows and not part.entry.closed]


def _place(entry: Entry, name: str, source: Array, rows: list[int], sequence_axes: tuple[int, ...]) -> None:
    if len(rows) == entry.rows and (entry.even or not sequence_axes):
        entry.outputs[name] = source[_cut(source.ndim, sequence_axes, entry.width)] if sequence_axes else source
        return
    target = entry.outputs.get(name)
    if target is None:
        shape = [entry.rows, *source.shape[1:]]
        for axis in sequence_axes:
            shape[axis] = entry.width
        target = entry.outputs[name] = np.zeros(shape, source.dtype)
    for position, row in enumerate(rows):
        cut = _cut(source.ndim, sequence_axes, entry.lengths[row] if entry.lengths else 0)
        target[row : row + 1][cut] = source[position : position + 1][cut]


@lru_cache(4096)
def _cut(ndim: int, axes: tuple[int, ...], length: int) -> tuple[slice, ...]:
    return tuple(slice(length) if axis in axes else slice(None) for axis in range(ndim))


def alone(part: Taken, shapes: tuple[Shape, ...], axes: BatchAxes) -> Batch:
    """One request's part of a batch as a batch of its own, as wide as its own longest row."""
    entry, rows = part.entry, len(part.rows)
    width = max((entry.lengths[row] for row in part.rows), default=0) if entry.lengths else 0
    tokens = sum(entry.tokens[row] for row in part.rows) if entry.tokens else 0
    return Batch((part,), rows, width, tokens, axes.computed(entry.packed, rows, width, tokens), shapes)


def answer(entry: Entry) -> InferResult:
    """The answer to a request that has all its rows."""
    request = entry.request
    outputs = tuple([(name, LocalTensor(entry.outputs[name])) for name in request.outputs])
    passed = time.monotonic() - request.arrival
    computed = min(entry.compute_seconds, passed)  # parts of a request may have run side by side
    return InferResult(request.id, outputs, passed - computed, computed)


def rows_of(arrays: Mapping[str, Array]) -> int:
    """The rows of a request of a model that is never batched: its first axis, as far as it has one."""
    first = next(iter(arrays.values()), np.empty(0))
    return int(first.shape[0]) if first.ndim else 1
