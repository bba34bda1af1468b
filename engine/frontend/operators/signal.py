"""Fourier transforms of known length: one matrix product with a constant matrix; of frames of a signal, a convolution.

A matrix of some hundred columns costs a matrix unit less than the steps of a fast transform cost in memory. What is too
long for that, or of a length that is not known, is `Opaque`.
"""

from __future__ import annotations

import numpy as np

from engine.frontend import foreign
from engine.frontend.onnx_node import OnnxNode, store
from engine.frontend.operators.linalg import matmul
from engine.frontend.operators.slicing import take
from engine.frontend.registry import Results, operator
from engine.ir import ops
from engine.ir.dim import Dim
from engine.ir.graph import Value

_MOST_ELEMENTS = 1 << 24  # of a matrix: 64 MB in fp32, a transform of 2048 complex numbers


@operator("DFT", since=20)
def DFT(node: OnnxNode, x: Value, length: Value | None = None, axis: Value | None = None) -> Results:
    along = int(node.scalar(axis, "axis")) if axis is not None else -2
    return _transform(node, x, length, along) or foreign.opaque(node, [x, length, axis])


@operator("DFT")
def DFT_17(node: OnnxNode, x: Value, length: Value | None = None) -> Results:
    return _transform(node, x, length, node.integer("axis", 1)) or foreign.opaque(node, [x, length])


def _transform(node: OnnxNode, x: Value, length: Value | None, along: int) -> Value | None:
    """The transform of [..., n, …, real or complex] along an axis; None where no matrix is made for it."""
    axis, parts = node.axis(along, x.rank), x.shape[-1]
    present = x.shape[axis]
    if axis == x.rank - 1 or parts not in (1, 2) or not x.dtype.is_float:
        raise node.invalid(f"axis {along} of an input of shape {[str(dim) for dim in x.shape]}")
    inverse, onesided = bool(node.integer("inverse", 0)), bool(node.integer("onesided", 0))
    if length is not None:
        size: Dim = int(node.scalar(length, "dft_length"))
    else:
        size = 2 * (present - 1) if inverse and onesided else present
    if not isinstance(size, int) or not isinstance(present, int) or 4 * size * present > _MOST_ELEMENTS:
        return None
    if size < 1:
        raise node.invalid(f"a transform of {size} numbers")
    matrix = fourier(size, parts == 2, inverse, onesided)[:present]
    rows, _, columns, results = matrix.shape
    width = rows * matrix.shape[1]
    # The axis and the pair of parts become the rows of a product, whatever lies between them.
    others = [i for i in range(x.rank - 1) if i != axis]
    x = take(node, x, axis, 0, rows)
    moved = node.transpose(x, (*others, axis, x.rank - 1))
    flat = node.reshape(moved, (*moved.shape[:-2], width))
    weight = node.constant(matrix.reshape(width, columns * results), x.dtype)
    result = matmul(node, flat if flat.rank > 1 else node.reshape(flat, (1, *flat.shape)), weight)
    apart = node.reshape(result, (*moved.shape[:-2], columns, results))
    back = [*others, axis, x.rank - 1]
    return node.transpose(apart, [back.index(i) for i in range(x.rank)])


def fourier(size: int, is_complex: bool, inverse: bool, onesided: bool) -> np.ndarray:
    """float64 [elements read, their parts, results, their parts] of the discrete Fourier transform of `size` numbers.

    Forward and `onesided` it gives the first half of the frequencies; inverse and `onesided` it takes those, and gives
    real numbers.
    """
    half = size // 2 + 1
    rows = np.arange(half if inverse and onesided else size)
    columns = np.arange(half if onesided and not inverse else size)
    angle = 2 * np.pi / size * (np.outer(rows, columns) % size)
    cosine, sine = np.cos(angle), np.sin(angle) * (-1 if inverse else 1)
    if inverse and onesided:
        # Of a real signal the other half is the conjugate of this one, but for the first and a middle frequency.
        twice = np.where((rows == 0) | (2 * rows == size), 1, 2)[:, None] / size
        return np.stack([cosine * twice, sine * twice], 1)[..., None][:, : 1 + is_complex]
    scale = 1 / size if inverse else 1
    real, imaginary = np.stack([cosine, -sine], -1), np.stack([sine, cosine], -1)
    return scale * np.stack([real, imaginary], 1)[:, : 1 + is_complex]


@operator("STFT")
def STFT(
    node: OnnxNode, x: Value, step: Value, window: Value | None = None, frame_length: Value | None = None
) -> Results:
    """[batch, samples, real or complex] → [batch, frames, frequencies, 2]: every frame is a place of a convolution,
    whose filters are the rows of the transform times the window."""
    hop = int(node.scalar(step, "frame_step"))
    shape = None if window is None else node.known(window)
    if frame_length is not None:
        length: Dim = int(node.scalar(frame_length, "frame_length"))
    else:
        length = window.shape[0] if window is not None else x.shape[1]
    onesided = bool(node.integer("onesided", 1))
    signal = node.reshape(x, (*x.shape, 1)) if x.rank == 2 else x
    if signal.rank != 3 or signal.shape[2] not in (1, 2) or not x.dtype.is_float or hop < 1:
        raise node.invalid(f"a signal of shape {[str(dim) for dim in x.shape]}, a step of {hop}")
    unknown = not isinstance(length, int) or 4 * length * length > _MOST_ELEMENTS
    if unknown or (window is not None and shape is None) or (onesided and signal.shape[2] == 2):
        return foreign.opaque(node, [x, step, window, frame_length])
    size = int(str(length))
    if shape is not None and shape.shape != (size,):
        raise node.invalid(f"a window of shape {list(shape.shape)} for frames of {size}")
    matrix = fourier(size, signal.shape[2] == 2, inverse=False, onesided=onesided)
    if shape is not None:
        matrix = matrix * shape.astype(np.float64)[:, None, None, None]
    samples, parts, frequencies, _ = matrix.shape
    filters = matrix.transpose(2, 3, 1, 0).reshape(2 * frequencies, parts, samples)
    op = ops.Conv((hop,), ((0, 0),), (1,), stores=store(x.dtype))
    frames = node.add(op, node.transpose(signal, (0, 2, 1)), node.constant(filters, x.dtype))
    apart = node.reshape(frames, (frames.shape[0], frequencies, 2, frames.shape[2]))
    return node.transpose(apart, (0, 3, 1, 2))
