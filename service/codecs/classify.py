"""Scores → labels: softmax and top-k. Called by the images and tokens routes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def probabilities(scores: NDArray[Any]) -> NDArray[np.float32]:
    """Softmax over the last axis; scores that are probabilities already (not negative, sum 1) stay as they are."""
    values = scores.astype(np.float32, copy=False)
    if values.size and values.min() >= 0 and np.allclose(values.sum(axis=-1), 1.0, atol=1e-3):
        return values
    with np.errstate(invalid="ignore"):  # of scores that are not finite; the routes look for what comes of them
        exponents = np.exp(values - values.max(axis=-1, keepdims=True))
        return np.asarray(exponents / exponents.sum(axis=-1, keepdims=True), np.float32)


def top_labels(row: NDArray[np.float32], labels: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    """The `top_k` most probable classes of one row (classes,), most probable first; ties keep the class order."""
    count = min(top_k, row.shape[0])
    least = np.partition(row, row.shape[0] - count)[row.shape[0] - count]
    among = np.flatnonzero(row >= least)  # all that tie for the last place, too
    order = among[np.argsort(-row[among], kind="stable")[:count]]
    return [
        {"label": labels[i] if i < len(labels) else str(i), "index": int(i), "probability": float(row[i])}
        for i in order
    ]
