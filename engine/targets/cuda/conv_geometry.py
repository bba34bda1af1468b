"""The sizes of a convolution as its kernels see them, and its weights in the layouts that they read. Called by
`conv.py` and `conv_simt.py`.

There are always three spatial axes; missing ones have size 1 and come first. A transposed convolution is one ordinary
convolution for each phase of its stride: the outputs that are a multiple of the stride apart see the same taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import gcd, prod

import numpy as np

from engine.ir.dim import Dim
from engine.ir.dtype import DType
from engine.ir.ops import Conv
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor, row_major
from engine.targets.cuda.kernel import I64, Argument, Pointer, ceildiv, pointer_to
from engine.targets.cuda.spaces import operand

AXES = ("d", "h", "w")
_PHASE = np.dtype(
    [
        ("w", "i8"), ("k", "u4"), ("w_stride", "u4"), ("kernel", "u4", 3), ("out", "u4", 3), ("start", "u4", 3),
        ("first_tap", "u4", 3), ("pad", "i4", 3),
    ],
    align=True,
)  # fmt: skip
"""`struct Phase` of kernels/conv_geometry.cuh."""


@dataclass(frozen=True)
class AxisPhase:
    """Outputs start, start + step, … along one axis: output t of them reads input t · stride − pad + j · dilation by
    the j-th of `taps`."""

    taps: range
    pad: int
    start: int
    out: int


@dataclass(frozen=True)
class Phase:
    """An ordinary convolution that computes some of the outputs."""

    axes: tuple[AxisPhase, ...]
    channels: int

    @property
    def out(self) -> tuple[int, ...]:
        return tuple(axis.out for axis in self.axes)

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(len(axis.taps) for axis in self.axes)

    @property
    def pads(self) -> tuple[int, ...]:
        return tuple(axis.pad for axis in self.axes)

    @property
    def k(self) -> int:
        """The length of the sums."""
        return prod(self.kernel) * self.channels


class Geometry:
    """A convolution of a step."""

    def __init__(self, step: Step) -> None:
        op = step.op
        assert isinstance(op, Conv)
        x, w, y = step.inputs[0], step.inputs[1], step.outputs[0]
        self.transposed = op.transposed
        self.axes = len(op.strides)
        self.images = x.shape[0]
        self.groups = op.groups
        self.channels = x.shape[1] // op.groups  # per group
        self.n = y.shape[1] // op.groups
        self.input = _three(x.shape[2:], 1)
        self.output = _three(y.shape[2:], 1)
        self.kernel = _three(w.shape[2:], 1)
        self.pads = _three([begin for begin, _ in op.pads], 0)
        self.op_strides = _three(op.strides, 1)
        self.op_dilations = _three(op.dilations, 1)
        # gcd: neighbouring taps that meet one phase lie stride / gcd apart, and read inputs dilation / gcd apart.
        common = [gcd(s, d) if op.transposed else 1 for s, d in zip(self.op_strides, self.op_dilations, strict=True)]
        self.tap_steps = tuple(s // g if op.transposed else 1 for s, g in zip(self.op_strides, common, strict=True))
        self.strides = (1, 1, 1) if op.transposed else self.op_strides
        """Between the inputs of neighbouring outputs of a phase."""
        self.dilations = tuple(d // g for d, g in zip(self.op_dilations, common, strict=True))
        """Between the inputs of neighbouring taps of a phase."""
        strides = operand(x, len(x.shape)).strides  # 0 for axes of size 1
        self.x_strides = (strides[0], *_three(strides[2:], 0))  # image, plane, row, pixel
        self.x_channel = strides[1] if x.shape[1] > 1 else 1
        self.x = pointer_to(x)
        self.x_dtype = x.dtype
        self.k = prod(self.kernel) * self.channels

    @property
    def pixels(self) -> int:
        """Output pixels of all images."""
        return self.images * prod(self.output)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The ordinary convolutions that it is made of; the first is the largest."""
        return tuple(Phase(axes, self.channels) for axes in product(*(self._along(axis) for axis in range(3))))

    def _along(self, axis: int) -> list[AxisPhase]:
        kernel, pad, out = self.kernel[axis], self.pads[axis], self.output[axis]
        if not self.transposed:
            return [AxisPhase(range(kernel), pad, 0, out)]
        stride, dilation, step = self.op_strides[axis], self.op_dilations[axis], self.tap_steps[axis]
        found = []
        for start in range(min(stride, out)):
            # Output o gets input i by tap t where o + pad = i · stride + t · dilation.
            ahead = start + pad
            taps = [tap for tap in range(min(step, kernel)) if (ahead - tap * dilation) % stride == 0]
            # From the last tap to the first, so that the inputs ascend.
            reached = range(taps[0], kernel, step)[::-1] if taps else range(0)
            first = (ahead - reached[0] * dilation) // stride if reached else 0
            found.append(AxisPhase(reached, -first, start, ceildiv(out - start, stride)))
        return found

    @property
    def rows(self) -> int:
        """Output pixels of all images of the largest phase."""
        return self.images * prod(self.phases[0].out)

    def reads_chunks(self, elements: int, dtype: DType) -> bool:
        """Whether every pixel's channels, from any multiple of `elements` on, are an aligned run of `dtype`."""
        counts = (*self.x_strides, self.x.offset // self.x_dtype.itemsize)
        return self.x_dtype is dtype and self.x_channel == 1 and all(count % elements == 0 for count in counts)

    def arguments(self) -> dict[str, Argument]:
        """What every kernel for convolutions is told."""
        image, plane, row, pixel = (I64(stride) for stride in self.x_strides)
        sizes = {
            "in": self.input, "out": self.output, "stride": self.strides, "pad": self.phases[0].pads,
            "dilation": self.dilations,
        }  # fmt: skip
        return {
            "x": self.x, "x_image": image, "x_depth": plane, "x_row": row, "x_pixel": pixel,
            "x_channel": I64(self.x_channel), "images": self.images, "n": self.n, "channels": self.channels,
            **{f"{name}_{axis}": values[i] for name, values in sizes.items() for i, axis in enumerate(AXES)},
        }  # fmt: skip


def sizes_of(shape: Sequence[Dim]) -> tuple[int, ...]:
    """Those of a result of a step, of which all are known."""
    return tuple(size for size in shape if isinstance(size, int))


def image_at(buffer: Buffer, dtype: DType, sizes: tuple[int, ...], begin: int) -> Tensor:
    """An image in NHWC, `begin` bytes into a buffer."""
    return Tensor(buffer, dtype, sizes, row_major(sizes, channels_last(len(sizes))), begin // dtype.itemsize)


def channels_last(rank: int) -> tuple[int, ...]:
    """The order of NHWC, for logical N, C, spatial axes."""
    return (0, *range(2, rank), 1)


def _three(values: Sequence[int], missing: int) -> tuple[int, ...]:
    return (*(missing,) * (3 - len(values)), *values)


def row_length(k: int, per_chunk: int) -> int:
    """k in whole chunks: the elements from one packed filter to the next."""
    return ceildiv(k, per_chunk) * per_chunk


def padded_k(geometry: Geometry, panel: int) -> int:
    """The length of a packed filter of the largest phase, its channels padded to whole panels of so many."""
    return prod(geometry.phases[0].kernel) * row_length(geometry.channels, panel)


def phase_table(geometry: Geometry, per_chunk: int) -> Pointer:
    """The phases for the device."""
    table = np.zeros(len(geometry.phases), _PHASE)
    start = 0
    for row, phase in zip(table, geometry.phases, strict=True):
        length = row_length(phase.k, per_chunk)
        row["w"], row["k"], row["w_stride"] = start, phase.k, length
        row["kernel"], row["out"], row["pad"] = phase.kernel, phase.out, phase.pads
        row["start"] = [axis.start for axis in phase.axes]
        row["first_tap"] = [axis.taps[0] if axis.taps else 0 for axis in phase.axes]
        start += geometry.groups * geometry.n * length
    return Pointer(Buffer("phases", BufferKind.PLAN, table.nbytes, table.view(np.uint8)), ctype="struct Phase")


def grouped(w: np.ndarray, groups: int, transposed: bool) -> np.ndarray:
    """A filter as the IR has it → [group, n, c, d, h, w]."""
    kernel = _three(w.shape[2:], 1)
    parts = w.reshape(groups, w.shape[0] // groups, w.shape[1], *kernel)
    return parts.swapaxes(1, 2) if transposed else parts


def pack_filter(w: np.ndarray, geometry: Geometry, per_chunk: int, panel: int = 1) -> np.ndarray:
    """[phase][group, n, (*kernel, c)] with c padded to whole panels of channels, and the rows to whole 16-byte chunks,
    one phase after the other."""
    parts = grouped(w, geometry.groups, geometry.transposed)
    packed = []
    for phase in geometry.phases:
        taken = parts
        for axis, along in enumerate(phase.axes):
            taken = taken.take(list(along.taps), axis=3 + axis)
        channels = [(0, 0)] * 5 + [(0, -geometry.channels % panel)]
        rows = np.pad(np.moveaxis(taken, 2, -1), channels).reshape(geometry.groups * geometry.n, -1)
        padding = -rows.shape[1] % per_chunk
        packed.append(np.pad(rows, ((0, 0), (0, padding))).reshape(-1))
    return np.concatenate(packed)


def pack_taps(w: np.ndarray, groups: int, transposed: bool, dtype: DType) -> np.ndarray:
    """[*kernel, c, (group, n)]."""
    parts = grouped(w, groups, transposed)  # g n c d h w
    order = parts.transpose(3, 4, 5, 2, 0, 1)
    return np.ascontiguousarray(order.reshape(*order.shape[:4], -1), dtype.numpy)


@dataclass(frozen=True)
class TapStrides:
    """How a filter lies: elements from group to group, output channel to output channel, input channel to input channel
    (both within a group), and along the axes of the kernel."""

    group: int
    column: int
    channel: int
    kernel: tuple[int, ...]

    def arguments(self) -> dict[str, Argument]:
        along = {f"w_{axis}": I64(stride) for axis, stride in zip(AXES, self.kernel, strict=True)}
        return {"w_group": I64(self.group), "w_column": I64(self.column), "w_channel": I64(self.channel), **along}


def tap_strides(w: Tensor, geometry: Geometry) -> TapStrides:
    """How a filter lies that has the shape of the IR's."""
    first, second, *kernel = w.strides
    if geometry.transposed:
        return TapStrides(geometry.channels * first, second, first, _three(kernel, 0))
    return TapStrides(geometry.n * first, first, second, _three(kernel, 0))
