"""Built architectures as files: ``<folder>/<name>/1/model.onnx``, as in a model repository, and beside it
``weights.npz``, the weights by the names of the peer's module. Whoever measures several models builds them at once."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.models.catalog import build

_MOST_PROCESSES = 8  # the largest takes 3 GB while it is built


def model_file(repository: Path, name: str) -> Path:
    """Where the file of a model lies."""
    return repository / name / "1" / "model.onnx"


def weights_file(model: Path) -> Path:
    """Where the weights of an architecture lie, beside its file."""
    return model.with_name("weights.npz")


def build_all(names: Iterable[str], repository: Path) -> None:
    """Build architectures into `repository`, several at a time in processes of their own."""
    distinct = list(dict.fromkeys(names))
    if not distinct:
        return
    workers = min(len(distinct), os.cpu_count() or 1, _MOST_PROCESSES)
    # Spawned: a fork of a process that uses a GPU or threads is not safe.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(build_here, distinct, [repository] * len(distinct)))


def build_here(name: str, repository: Path) -> None:
    """Build one architecture into `repository`, in this process."""
    built = build(name)
    path = model_file(repository, name)
    path.parent.mkdir(parents=True)
    path.write_bytes(built.model.SerializeToString())
    np.savez(weights_file(path), **built.weights)  # type: ignore[arg-type]
