"""The counters behind `GET /v2/models/{model}/stats`, in the protocol's own shape. Event loop only."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NS = 1_000_000_000


@dataclass(slots=True)
class Duration:
    """How often, and how long in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        """So many more, with the sum of their times."""
        self.count += count
        self.seconds += seconds

    def document(self) -> dict[str, int]:
        """The protocol's form: nanoseconds."""
        return {"count": self.count, "ns": max(round(self.seconds * _NS), 0)}


@dataclass(slots=True)
class ModelStatistics:
    """Counters of one model version since it was loaded."""

    inference_count: int = 0
    execution_count: int = 0
    last_inference_ms: int = 0
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, Duration] = field(default_factory=dict)

    def answered(self, times: NDArray[np.float64]) -> None:
        """Requests were answered: their seconds in all, in the queue, in preprocessing, computing and postprocessing,
        (5, requests)."""
        stages = (self.success, self.queue, self.compute_input, self.compute_infer, self.compute_output)
        for stage, seconds in zip(stages, times.sum(axis=1).tolist(), strict=True):
            stage.add(seconds, times.shape[1])

    def failed(self, total: float) -> None:
        """One request failed."""
        self.fail.add(total)

    def ran(self, rows: NDArray[np.float64], seconds: NDArray[np.float64], last: float) -> None:
        """Batches were computed: their rows, and how long each took, (batches,); the last one at a time of
        `time.time()`."""
        self.inference_count += int(rows.sum())
        self.execution_count += rows.size
        self.last_inference_ms = int(last * 1e3)
        for size in np.unique(rows):
            those = rows == size
            self.batches.setdefault(int(size), Duration()).add(float(seconds[those].sum()), int(those.sum()))

    def document(self, name: str, version: int) -> dict[str, Any]:
        """One entry of `model_stats`."""
        none = Duration().document()
        return {
            "name": name,
            "version": str(version),
            "last_inference": self.last_inference_ms,
            "inference_count": self.inference_count,
            "execution_count": self.execution_count,
            "inference_stats": {
                "success": self.success.document(),
                "fail": self.fail.document(),
                "queue": self.queue.document(),
                "compute_input": self.compute_input.document(),
                "compute_infer": self.compute_infer.document(),
                "compute_output": self.compute_output.document(),
                "cache_hit": none,
                "cache_miss": none,
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": none,
                    "compute_infer": duration.document(),
                    "compute_output": none,
                }
                for size, duration in sorted(self.batches.items())
            ],
        }
