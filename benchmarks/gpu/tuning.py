"""The tuner before the benchmarks: it chooses the tiles of products and convolutions, as ``python -m engine tune``
does, while nothing else runs on the GPU. What it finds is on disk, and taken by processes that start later."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import cupy

import engine
from benchmarks.cases.models import ModelCase
from benchmarks.cases.packed import PackedCase
from benchmarks.measure import reason
from engine.errors import EngineError
from engine.specs import TileTrial


def tune_models(cases: Sequence[ModelCase], files: Mapping[str, Path], seconds: float) -> None:
    """Tune the products and convolutions of models in fp16, in the order of the cases of each, and say what was done:
    those of plans on packed tokens, where the cases have such, before those of padded ones. None is begun after
    `seconds`."""
    begin = time.monotonic()
    for name in dict.fromkeys(case.model for case in cases):
        left = begin + seconds - time.monotonic()
        if left <= 0:
            print(f"the time for tuning is up before {name}", flush=True)
            return
        try:
            packed = any(isinstance(case, PackedCase) for case in cases)
            with engine.load(files[name], device="cuda:0", precision="fp16", strict=True, packed=packed) as model:
                for sizes in _plans(model, [case for case in cases if case.model == name]):
                    left = begin + seconds - time.monotonic()
                    tell(_named(name, sizes), model.tune(sizes, seconds=left))
        except EngineError as error:
            print(f"{name} is not all tuned, the cost model's tiles are taken: {reason(error)}", flush=True)
    cupy.get_default_memory_pool().free_all_blocks()  # other processes need it


def _plans(model: engine.Model, cases: Sequence[ModelCase]) -> Iterator[Mapping[str, int]]:
    """The sizes of the plans that cases of one model run."""
    for case in cases:
        batch = model.pack(case.feeds()) if isinstance(case, PackedCase) else None
        if batch is not None:
            yield batch.sizes
    yield from (case.sizes for case in cases)


def _named(model: str, sizes: Mapping[str, int]) -> str:
    return " ".join([model, *(f"{symbol}={size}" for symbol, size in sizes.items())])


def tell(what: str, trials: Iterable[TileTrial]) -> None:
    """Run trials and say how many were timed, and of how many products and convolutions."""
    begin, every = time.monotonic(), list(trials)
    timed = [trial for trial in every if trial.measured_us is not None]
    tuned, count = len({trial.product for trial in timed}), len({trial.product for trial in every})
    print(
        f"{what}: timed {len(timed)} tiles of {tuned} of {count} products and convolutions: "
        f"{time.monotonic() - begin:.0f} s",
        flush=True,
    )
