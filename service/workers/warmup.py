"""A model's first runs: they warm it up and check that batching changes no answer. Called on the loader thread.

Batching is read from the specs (policy.find_axes), then proved: rows together must equal each row alone, and a
padded row must equal the same row without padding; where the engine leaves padding out, rows of any length may then
share a run. A model that fails the proof is served with less batching, never wrongly. Sizes are the smallest that prove
anything, and a model that computes for seconds on one row is not proved: its rows would gain nothing from each other.
"""

import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.batching.policy import MASK_NAMES, BatchAxes, find_axes
from service.codecs.tensor_types import has_datatype
from service.workers.engine_api import EngineDeviceInfo, EngineModel, EngineTensorSpec
from service.workers.messages import BatchingMode, Device, LoadModel, TensorInfo

log = logging.getLogger(__name__)

_TOLERANCE = 2e-2  # relative L2: wide enough for fp16 and for another tile order, far below a mixed-up row
_SHORT, _LONG = 5, 8  # tokens of the probe's rows
_MAGNITUDE = 8.0  # of the probe's rows beside each other
_LARGE = 255  # the largest integer that is tried
_GUESS = 8  # extent of a symbolic dim that nothing says more about
_LONG_S = 1.0  # seconds of one row's arithmetic at the device's ceiling

Array = NDArray[Any]


def describe_tensors(specs: Iterable[EngineTensorSpec]) -> tuple[TensorInfo, ...]:
    """The engine's tensor specs as message data."""
    return tuple(TensorInfo(s.name, np.dtype(s.dtype), tuple(s.shape)) for s in specs)


def describe_device(info: EngineDeviceInfo) -> Device:
    """The engine's device as message data."""
    return Device(
        info.device, info.name, info.arch, info.threads, info.peak_flops, info.peak_bytes, info.peak_cache_bytes
    )


def probe(model: EngineModel, command: LoadModel, engine_error: type[Exception]) -> BatchAxes:
    """Warm a model up and return how it may be batched.

    Raises the engine's error if a tensor has a type that no request or answer can have, and if a model whose shapes are
    all known cannot run; where extents or strings had to be
    guessed, a failed run proves nothing about the model, and it is served unbatched.
    """
    inputs, outputs = describe_tensors(model.inputs), describe_tensors(model.outputs)
    for spec in (*inputs, *outputs):
        if not has_datatype(spec.dtype):
            raise engine_error(
                f"tensor {spec.name!r} is of {spec.dtype.name}, which the protocol does not have: cast it in the model"
            )
    axes = find_axes(inputs, outputs)
    axes = replace(axes, longest=model.size_limits.get(axes.sequence or ""))
    open_dims = any(isinstance(dim, str) for spec in inputs for dim in spec.shape[1:]) and axes.sequence is None
    strings = [spec.name for spec in inputs if spec.dtype == object]
    try:
        one = _feeds(inputs, axes, command, rows=1, width=_SHORT)
        first = model.run(one)
        if axes.mode is BatchingMode.NONE:
            return axes
        seconds = _least_seconds(model)
        if seconds > _LONG_S:
            return axes.without_batching(f"one row computes for {seconds:.1f} s or more, so rows together gain nothing")
        rows = _rows(one)
        alone = [first]
        large = _large(one) if axes.sequence is None else None
        answers = None if large is None else _answers(model, large, engine_error)
        if large is not None and answers is not None:
            rows.insert(1, large)
            alone.append(answers)
        together = model.run({name: np.concatenate([row[name] for row in rows]) for name in one})
        alone += [*(model.run(row) for row in rows[len(alone) : -1]), first]
    except engine_error as error:
        if not strings and (not open_dims or command.image_size is not None):
            raise
        guess = f"strings for input '{strings[0]}'" if strings else "sizes"
        log.info("model %s: the warm-up run with guessed %s failed: %s", command.key, guess, error)
        return axes.without_batching(
            f"the warm-up run with guessed {guess} failed, so that batching could not be checked: {error}"
        )
    for name, batch in together.items():
        if any(not _close(batch[i : i + 1], row[name]) for i, row in enumerate(alone)) or len(batch) != len(rows):
            return axes.without_batching(f"rows together give another '{name}' than each alone")
    if axes.mode is BatchingMode.PADDED:
        return _probe_padding(model, inputs, axes, one, first)
    return axes


def _least_seconds(model: EngineModel) -> float:
    """What the arithmetic of the model's only run so far takes at the least."""
    return sum(kernel.flops for kernel in model.kernel_stats()) / model.device_info.peak_flops


def _probe_padding(
    model: EngineModel,
    inputs: tuple[TensorInfo, ...],
    axes: BatchAxes,
    one: dict[str, Array],
    first: Mapping[str, Array],
) -> BatchAxes:
    padded = {spec.name: np.pad(one[spec.name], ((0, 0), (0, _LONG - _SHORT))) for spec in inputs}
    wide = model.run(padded)
    for name, expected in first.items():
        cut = tuple(slice(extent) for extent in expected.shape)
        if not _close(wide[name][cut], expected):
            return axes.without_padding(f"rows of equal length: padding changes '{name}'")
    return axes if model.packed_mask is None else axes.packed(model.packed_mask, model.computed_tokens)


def _feeds(
    inputs: tuple[TensorInfo, ...], axes: BatchAxes, command: LoadModel, rows: int, width: int
) -> dict[str, Array]:
    generator = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for spec in inputs:
        shape = list(spec.shape)
        if shape and isinstance(shape[0], str):
            shape[0] = rows
        if axes.sequence is not None:
            shape[1] = width
        if len(shape) == 4 and command.image_size is not None:
            spatial = (1, 2) if shape[3] in (1, 3, 4) else (2, 3)
            for axis, extent in zip(spatial, command.image_size, strict=True):
                shape[axis] = extent if isinstance(shape[axis], str) else shape[axis]
        extents = tuple(dim if isinstance(dim, int) else _GUESS for dim in shape)
        _check_size(spec, extents)
        if spec.name in MASK_NAMES:
            feeds[spec.name] = np.ones(extents, spec.dtype)
        elif spec.dtype.kind in "iub" and "type" not in spec.name:
            feeds[spec.name] = generator.integers(0, 2, extents).astype(spec.dtype)
        elif spec.dtype.kind == "f":
            feeds[spec.name] = generator.standard_normal(extents, np.float32).astype(spec.dtype, copy=False)
        elif spec.dtype == object:
            feeds[spec.name] = np.full(extents, "1", object)  # a word, and a number for models that read one
        else:
            feeds[spec.name] = np.zeros(extents, spec.dtype)
    return feeds


def _check_size(spec: TensorInfo, extents: tuple[int, ...]) -> None:
    """Raises MemoryError for an input that no request could bring: the system might promise it memory all the same,
    and end the process on first use."""
    nbytes = math.prod(extents) * spec.dtype.itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if nbytes > memory // 4:
        raise MemoryError(
            f"input '{spec.name}' of shape {list(extents)} has {nbytes} bytes, and the machine has {memory} in all; "
            "export the model with smaller inputs"
        )


def _rows(one: Mapping[str, Array]) -> list[Mapping[str, Array]]:
    """Rows for one run, of which the first and the last are `one`: between them what it is not, and floats of other
    magnitudes, beside which those of the others are small or large. A model that finds a scale from the whole batch, as
    dynamic quantisation does, or treats later rows otherwise gives them other answers than alone."""
    other = {name: _other(array) for name, array in one.items()}
    return [one, other, _scaled(one, _MAGNITUDE), _scaled(other, 1 / _MAGNITUDE), one]


def _large(one: Mapping[str, Array]) -> dict[str, Array] | None:
    """A row with integers up to 255, as pixels are, beside which those of the others, 0 and 1, are small; None where
    the model has no integers. It may have none that may be so large, such as places in a table."""
    generator = np.random.default_rng(1)
    large = {
        name: generator.integers(0, min(_LARGE, np.iinfo(array.dtype).max), array.shape, endpoint=True).astype(
            array.dtype
        )
        for name, array in one.items()
        if array.dtype.kind in "iu" and name not in MASK_NAMES
    }
    return {**one, **large} if large else None


def _answers(model: EngineModel, row: Mapping[str, Array], engine_error: type[Exception]) -> Mapping[str, Array] | None:
    """What the model makes of a row; None where it is none that it can compute."""
    try:
        return model.run(row)
    except engine_error:
        return None


def _scaled(row: Mapping[str, Array], factor: float) -> dict[str, Array]:
    return {
        name: (array * np.float32(factor)).astype(array.dtype) if array.dtype.kind == "f" else array
        for name, array in row.items()
    }


def _other(array: Array) -> Array:
    """Another row: what the first one is not, so that a mixed-up batch shows; all-one masks stay."""
    if array.dtype.kind in "iub":
        return array if array.all() or not array.any() else (1 - array.astype(np.int64)).astype(array.dtype)
    if array.dtype == object:
        return np.full_like(array, "2")
    if array.dtype.kind != "f":
        return array
    return (array.astype(np.float32) * -0.5 + 0.25).astype(array.dtype)


def _close(got: Array, expected: Array) -> bool:
    if got.shape != expected.shape or got.dtype == object:
        return np.array_equal(got, expected)
    a, b = got.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return bool(np.array_equal(a, b, equal_nan=True))
    return bool(np.linalg.norm(a - b) <= _TOLERANCE * max(float(np.linalg.norm(b)), 1e-6))
