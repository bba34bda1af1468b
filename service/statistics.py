"""The counters behind `GET /v2/models/{model}/stats`, in the protocol's own shape. Event loop only."""

import time
from dataclasses import dataclass, field
from typing import Any

from service.workers.messages import BatchDone

_NS = 1_000_000_000


@dataclass(slots=True)
class Duration:
    """How often, and how long in all."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.count += 1
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

    def answered(self, total: float, queue: float, preprocess: float, compute: float, postprocess: float) -> None:
        """One request was answered; times in seconds."""
        self.success.add(total)
        self.queue.add(queue)
        self.compute_input.add(preprocess)
        self.compute_infer.add(compute)
        self.compute_output.add(postprocess)

    def failed(self, total: float) -> None:
        """One request failed."""
        self.fail.add(total)

    def ran(self, batch: BatchDone) -> None:
        """One batch was computed."""
        self.inference_count += batch.rows
        self.execution_count += 1
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.batches.setdefault(batch.rows, Duration()).add(batch.compute_seconds)

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
