"""``python -m engine check``: compare a model with onnx.reference, which shares no code with the engine."""

from __future__ import annotations

import argparse

import numpy as np

from engine.cli.common import add_feed_arguments, bound, feeds, open_model

NAME = "check"
HELP = "compare a model's outputs with onnx.reference on the same inputs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_feed_arguments(parser)
    parser.add_argument(
        "--tolerance", type=bound, default=1e-4, help="largest relative L2 error (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> int:
    from onnx.reference import ReferenceEvaluator

    with open_model(arguments) as model:
        given = feeds(arguments, model)
        ours = model.run(given)
        expected = {
            name: np.array(array)
            for name, array in zip(ours, ReferenceEvaluator(arguments.model).run(list(ours), given), strict=True)
        }
        model.clear_padding(expected, given)
    failed = False
    for name, array in ours.items():
        error = relative_error(array, expected[name])
        right = error <= arguments.tolerance
        failed |= not right
        print(f"{name}: relative L2 error {error:.2e} {'ok' if right else f'above {arguments.tolerance:g}'}")
    return int(failed)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """‖actual − expected‖₂ / ‖expected‖₂ in float64; infinite where shapes, NaN positions or strings differ."""
    if actual.dtype == object:
        return 0.0 if actual.tolist() == expected.tolist() else float("inf")
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    difference = np.where(same, 0.0, a - b)
    if not np.isfinite(difference).all():
        return float("inf")
    norm = float(np.linalg.norm(np.where(np.isfinite(b), b, 0.0)))
    distance = float(np.linalg.norm(difference))
    return distance / norm if norm else distance
