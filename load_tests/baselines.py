"""What the engine does without a service: alone, and with the decoding of photos that a service cannot do without. In
this process, for a while at a time, so that a measurement can take turns with servers. Called by `end_to_end`."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import engine
from load_tests.payloads import photos
from service.batching.policy import bucket_of
from service.codecs.images import ImageSpec, decode, make_image_spec
from service.model_config import read_model_config
from service.settings import Settings
from service.workers.messages import BatchingOptions

_BATCHES_AHEAD = 3  # that are decoded, or being decoded, while one is computed: as many as 64 clients keep a server in
_DRAWS = 20_000  # of which some make nearly every size that a server's runs have
Array = NDArray[np.generic]

Sizes = tuple[tuple[str, int], ...]
"""The open sizes of a run by name, such as its rows and their tokens."""


@dataclass(frozen=True)
class Turn:
    """`requests` that were done in `seconds` of the clock, with CPU seconds of whoever did them and whoever asked."""

    requests: int
    seconds: float
    server_cpu: float
    client_cpu: float = 0.0

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


class Alone:
    """The engine with one model, in a process that does nothing else meanwhile. To be closed."""

    def __init__(self, folder: Path, lengths: Sequence[int] = ()) -> None:
        """`lengths`: the tokens of the rows that are sent, each as often as the others, of a model that packs them."""
        self._folder = folder
        self._lengths = np.array(lengths, np.int64)
        self._model = engine.load(str(folder / "1" / "model.onnx"))

    def close(self) -> None:
        """All memory back."""
        self._model.close()

    def engine_rows(self, seconds: float, shapes: Mapping[Sizes, int]) -> Turn:
        """Runs of these sizes, each as often as the others as `shapes` says, in random order; a row is a request."""
        feeds = {sizes: self._feeds(dict(sizes)) for sizes in shapes}
        for feed in feeds.values():
            self._model.run(feed)  # the plan for these sizes
        deck = [feeds[sizes] for sizes, runs in shapes.items() for _ in range(runs)]
        random.Random(0).shuffle(deck)
        return _timed(seconds, map(self._run, cycle(deck)))

    def _feeds(self, sizes: Mapping[str, int]) -> dict[str, Array]:
        generator = np.random.default_rng(0)
        feeds: dict[str, Array] = {}
        for spec in self._model.inputs:
            shape = [dim if isinstance(dim, int) else sizes[dim] for dim in spec.shape]
            values: Array = generator.standard_normal(shape) if spec.dtype.kind == "f" else np.ones(shape)
            packed = self._model.packed_size
            if packed is not None and packed in sizes and spec.name == self._model.packed_mask:
                rows, width = shape
                values = np.arange(width) < self._drawn(sizes[packed], rows, width, generator)[:, None]
            feeds[spec.name] = values.astype(spec.dtype)
        return feeds

    def _drawn(self, computed: int, rows: int, width: int, generator: np.random.Generator) -> NDArray[np.int64]:
        """The tokens of rows that make a run of this size: the first that come up where rows are drawn as those are
        that are sent. Where none do, as even as can be: no others take the engine less time."""
        if self._lengths.size:
            drawn: NDArray[np.int64] = generator.choice(self._lengths, (_DRAWS, rows))
            longest, totals = drawn.max(axis=1), drawn.sum(axis=1)
            for row in np.flatnonzero(longest <= width):
                is_wide = bucket_of(int(longest[row]), BatchingOptions().buckets) == width
                if is_wide and self._model.computed_tokens(rows, width, int(totals[row])) == computed:
                    return np.array(drawn[row])
        even: NDArray[np.int64] = computed // rows + (np.arange(rows) < computed % rows)
        return even

    def _run(self, feeds: Mapping[str, Array]) -> int:
        """Rows of a run."""
        self._model.run(feeds)
        return len(next(iter(feeds.values())))

    def decoded_photos(self, seconds: float, batch: int) -> Turn:
        """JPEG files decoded by the service's function on as many threads as it has by default, `batch` at a time
        through the engine, while the threads decode the next ones."""
        threads = Settings.model_fields["preprocess_threads"].default
        spec = self._images()
        with ThreadPoolExecutor(threads) as pool:
            pixels = _pictures(pool, spec, batch)
            name = spec.input
            self._run({name: next(pixels)})
            try:
                return _timed(seconds, (self._run({name: batch}) for batch in pixels))
            finally:
                pool.shutdown(cancel_futures=True)

    def _images(self) -> ImageSpec:
        (tensor,) = self._model.inputs
        config = read_model_config(self._folder / "model.toml").images
        spec = make_image_spec(tensor.name, tensor.dtype, tensor.shape, config)
        assert spec is not None, "a model for photos"
        return spec


def _pictures(pool: ThreadPoolExecutor, spec: ImageSpec, batch: int) -> Iterator[Array]:
    """Batches of decoded photos, without end."""
    source = cycle(photos())
    limits = tuple(Settings.model_fields[name].default for name in ("max_image_bytes", "max_image_pixels"))
    waiting: deque[Future[Array]] = deque()
    while True:
        while len(waiting) < batch * (1 + _BATCHES_AHEAD):
            waiting.append(pool.submit(decode, next(source).jpeg, spec, *limits))
        yield np.stack([waiting.popleft().result() for _ in range(batch)])


def _timed(seconds: float, work: Iterable[int]) -> Turn:
    """`work` says after each step how many requests that was; it is left when the time is over."""
    requests, began, cpu = 0, time.perf_counter(), time.process_time()
    for done in work:
        requests += done
        if time.perf_counter() - began >= seconds:
            break
    return Turn(requests, time.perf_counter() - began, time.process_time() - cpu)
