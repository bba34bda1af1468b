"""Resize and Upsample in all their forms. What the IR's `Resize` cannot say becomes `Opaque`: crops, and integers that
are interpolated."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np

from engine.frontend import foreign
from engine.frontend.elements import Ratio
from engine.frontend.onnx_node import OnnxNode, store
from engine.frontend.registry import Results, operator
from engine.ir import ops
from engine.ir.dim import Dim, Sym, floordiv
from engine.ir.graph import Value

_COORDINATES = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric")


def _scaled(node: OnnxNode, size: Dim, scale: float) -> Dim:
    """⌊size · scale⌋ for a scale that is a float32 near a simple fraction."""
    if not np.isfinite(scale) or scale <= 0:
        raise node.invalid(f"scale {scale}")
    if isinstance(size, int):
        return int(np.floor(size * scale))
    fraction = Fraction(scale).limit_denominator(4096)
    if abs(float(fraction) - scale) > 1e-6 * scale:
        raise node.unsupported(f"scale {scale} along an axis of unknown size ({size})")
    return floordiv(size * fraction.numerator, fraction.denominator)


def _scale_numbers(node: OnnxNode, scales: Value) -> list[float]:
    known = node.builder.content(scales)
    if known is None:
        raise node.unsupported("scales computed from data")
    if any(isinstance(element, (Sym, Ratio)) for element in known.flat):
        raise node.unsupported("scales that depend on the inputs' shapes; give sizes instead")
    return [float(element) for element in known.flat]


@operator("Resize", since=11)
def Resize(
    node: OnnxNode, x: Value, roi: Value | None = None, scales: Value | None = None, sizes: Value | None = None
) -> Results:
    mode = node.choice("mode", "nearest", "linear", "cubic")
    coordinates = node.text("coordinate_transformation_mode", "half_pixel")
    if coordinates not in _COORDINATES or not (x.dtype.is_float or mode == "nearest"):
        return foreign.opaque(node, [x, roi, scales, sizes])
    axes = [node.axis(axis, x.rank) for axis in node.integers("axes", range(x.rank))]
    shape = list(x.shape)
    factors: list[float | None] = [1.0] * x.rank
    if sizes is not None and sizes.shape != (0,):
        wanted = node.dims(sizes, "sizes")
        _check_count(node, len(wanted), len(axes))
        policy = node.choice("keep_aspect_ratio_policy", "stretch", "not_larger", "not_smaller")
        if policy != "stretch":
            wanted, shared = _keep_aspect(node, [x.shape[axis] for axis in axes], wanted, policy)
        for axis, size in zip(axes, wanted, strict=True):
            shape[axis] = size
            factors[axis] = None if policy == "stretch" else shared
    elif scales is not None:
        numbers = _scale_numbers(node, scales)
        _check_count(node, len(numbers), len(axes))
        for axis, number in zip(axes, numbers, strict=True):
            shape[axis], factors[axis] = _scaled(node, x.shape[axis], number), number
    else:
        raise node.invalid("neither scales nor sizes")
    op = ops.Resize(
        tuple(shape),
        tuple(factors),
        ops.ResizeMode(mode),
        coordinates,
        node.choice("nearest_mode", "round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
        node.number("cubic_coeff_a", -0.75),
        bool(node.integer("antialias", 0)) and mode != "nearest",
        bool(node.integer("exclude_outside", 0)) and mode != "nearest",
        store(x.dtype),
    )
    return _axis_by_axis(node, op, x) if op.antialias else node.add(op, x)


def _axis_by_axis(node: OnnxNode, op: ops.Resize, x: Value) -> Value:
    """A long filter over one axis after the other meets far fewer elements than their product."""
    for axis, (size, scale) in enumerate(zip(op.shape, op.scales, strict=True)):
        if size != x.shape[axis] or scale not in (None, 1.0):
            shape = tuple(size if i == axis else dim for i, dim in enumerate(x.shape))
            scales = tuple(scale if i == axis else 1.0 for i in range(x.rank))
            x = node.add(replace(op, shape=shape, scales=scales), x)
    return x


def _check_count(node: OnnxNode, given: int, axes: int) -> None:
    if given != axes:
        raise node.invalid(f"{given} sizes or scales for {axes} axes")


def _keep_aspect(node: OnnxNode, present: list[Dim], wanted: list[Dim], policy: str) -> tuple[list[Dim], float]:
    ratios = []
    for size, target in zip(present, wanted, strict=True):
        if not isinstance(size, int) or not isinstance(target, int):
            raise node.unsupported(f"keep_aspect_ratio_policy along an axis of unknown size ({size})")
        ratios.append(target / size)
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    return [int(np.floor(scale * size + 0.5)) for size in present if isinstance(size, int)], scale


@operator("Resize", since=10)
@operator("Upsample")
def Upsample(node: OnnxNode, x: Value, scales: Value) -> Value:
    mode = {"nearest": "nearest", "linear": "linear", "bilinear": "linear"}.get(node.text("mode", "nearest"))
    if mode is None:
        raise node.unsupported(f"mode {node.text('mode')!r}")
    numbers = _scale_numbers(node, scales)
    _check_count(node, len(numbers), x.rank)
    shape = tuple(_scaled(node, size, number) for size, number in zip(x.shape, numbers, strict=True))
    return node.add(
        ops.Resize(shape, tuple(numbers), ops.ResizeMode(mode), "asymmetric", "floor", stores=store(x.dtype)), x
    )
