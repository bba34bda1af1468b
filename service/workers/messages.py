"""What the HTTP side and an engine worker say to each other: frozen dataclasses of plain data and tensor handles.

The HTTP side sends `Command`s through a `Transport` (transport.py) and gets `Report`s back; nothing else crosses, so
that a worker may live in this process or in another (wire.py makes bytes of them). Times are seconds of
`time.monotonic()`, which processes of one host share.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.record import record


class FailureCode(StrEnum):
    """Why a worker could not answer."""

    INVALID_INPUT = "invalid_input"
    TOO_LARGE = "too_large"
    OVERLOADED = "overloaded"
    DEADLINE = "deadline"
    NOT_LOADED = "not_loaded"
    OUT_OF_MEMORY = "out_of_memory"
    WORKER_LOST = "worker_lost"
    ENGINE = "engine"


class BatchingMode(StrEnum):
    """How rows of different requests may share one run of a model."""

    NONE = "none"
    ROWS = "rows"  # rows of equal shape
    PADDED = "padded"  # rows of unequal length, padded along the sequence axis under a mask
    PACKED = "packed"  # rows of any length: the engine leaves out what the mask hides


@dataclass(frozen=True, slots=True, order=True)
class ModelKey:
    """One version of one model. `generation` tells apart what the same folder held at different times."""

    name: str
    version: int
    generation: int = 0

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


@record
class LocalTensor:
    """A tensor that this process sees, in its own memory or in shared memory; neither side writes to it."""

    array: NDArray[Any]

    def view(self) -> NDArray[Any]:
        """The array behind the handle, not copied."""
        return self.array


TensorHandle = LocalTensor
NamedTensors = tuple[tuple[str, TensorHandle], ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, dtype and shape of a model's input or output; symbolic dims are strings."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class BatchingOptions:
    """How a model's requests are put together.

    `max_batch` rows and `max_tokens` tokens bound one run, padding included where rows are padded; `buckets` are the
    edges that group sequences of similar length, or, where rows are packed, the widths in which they are handed over;
    `queue_batches` full runs may wait before requests are refused.
    """

    max_batch: int = 16
    max_tokens: int = 1024
    max_delay_s: float = 0.0
    buckets: tuple[int, ...] = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
    queue_batches: int = 16


@dataclass(frozen=True, slots=True)
class LoadModel:
    """Load a model file, warm it up, then report `ModelReady` or `LoadFailed`.

    `sizes` gives the extent of symbolic dims for the warm-up run, by axis name or by "height"/"width" for images.
    """

    key: ModelKey
    path: str
    device: str
    precision: str
    threads: int | None
    batching: BatchingOptions
    image_size: tuple[int, int] | None
    packed: str = "auto"


@record
class Infer:
    """Run one request. `lengths` are the tokens of each row where rows are shorter than the tensors are wide."""

    id: int
    key: ModelKey
    inputs: NamedTensors
    outputs: tuple[str, ...]
    lengths: tuple[int, ...]
    arrival: float
    deadline: float
    priority: int


@record
class Cancel:
    """Nobody waits for this request any more; drop what has not started."""

    id: int


@dataclass(frozen=True, slots=True)
class Unload:
    """Finish what waits for a model, then give its memory back; report `Unloaded`."""

    key: ModelKey


@dataclass(frozen=True, slots=True)
class Stats:
    """Report `StatsReport` under the same id."""

    id: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Report `ProfileReport` under the same id: the plans of a model, and the steps of the one of this name (None: of
    the one that has taken the most time)."""

    id: int
    key: ModelKey
    plan: str | None


@dataclass(frozen=True, slots=True)
class Stop:
    """Finish everything accepted, close every model, report `Stopped`."""


Command = LoadModel | Infer | Cancel | Unload | Stats | Profile | Stop


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model runs; the peaks are measured ceilings (FLOP/s, bytes/s of memory and of the cache)."""

    device: str
    name: str
    arch: str
    threads: int
    peak_flops: float
    peak_bytes: float
    peak_cache_bytes: float

    def floors(self, flops: float, nbytes: float, cached_bytes: float) -> tuple[float, float]:
        """Seconds that so many FLOPs, and that so many bytes, some of them from the cache, take at least; zeros where
        the ceilings are not known."""
        if min(self.peak_flops, self.peak_bytes, self.peak_cache_bytes) <= 0:
            return 0.0, 0.0
        moving = (nbytes - cached_bytes) / self.peak_bytes + cached_bytes / self.peak_cache_bytes
        return flops / self.peak_flops, moving


@dataclass(frozen=True, slots=True)
class ModelReady:
    """A model is loaded and warm. `batching_reason` says in words why `batching` is what it is."""

    key: ModelKey
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    device: Device
    load_seconds: float
    fallback_ops: int
    batching: BatchingMode
    batching_reason: str


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A model could not be loaded; nothing of it is left in memory. `unread` where its files could not be read: the
    same ones may be read another time."""

    key: ModelKey
    reason: str
    unread: bool = False


@record
class InferResult:
    """The answer to an `Infer`: outputs in the order asked for, and where the time went (seconds).

    `queue_seconds` is all the time on the engine side in which none of the request's rows ran.
    """

    id: int
    outputs: NamedTensors
    queue_seconds: float
    compute_seconds: float


@dataclass(frozen=True, slots=True)
class InferFailed:
    """The refusal of an `Infer`. `retry_after` (seconds) comes from the measured rate."""

    id: int
    code: FailureCode
    reason: str
    retry_after: float | None = None


@record
class BatchDone:
    """One run of a model that succeeded, for the metrics. `tokens` and `padding` are 0 for models without sequences;
    `request` is one that had rows in it."""

    key: ModelKey
    rows: int
    tokens: int
    padding: int
    compute_seconds: float
    request: int


@dataclass(frozen=True, slots=True)
class Unloaded:
    """A model's memory is back, or left to other front ends that hold it."""

    key: ModelKey


@dataclass(frozen=True, slots=True)
class KernelCounters:
    """What one kernel of a model did since it was loaded; `cached_bytes` are those that the cache can hold. The floors
    are the seconds that its FLOPs and that its bytes take at least on the device it ran on; 0 where the device has no
    known ceilings."""

    kernel: str
    op: str
    launches: int
    seconds: float
    flops: float
    bytes: float
    cached_bytes: float
    flops_floor_seconds: float
    bytes_floor_seconds: float

    def plus(self, other: "KernelCounters") -> "KernelCounters":
        """Both together."""
        return KernelCounters(
            self.kernel,
            self.op,
            self.launches + other.launches,
            self.seconds + other.seconds,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.cached_bytes + other.cached_bytes,
            self.flops_floor_seconds + other.flops_floor_seconds,
            self.bytes_floor_seconds + other.bytes_floor_seconds,
        )


@dataclass(frozen=True, slots=True)
class ModelStats:
    """Counters of one loaded model: kernels, bytes of memory by kind, requests waiting."""

    key: ModelKey
    kernels: tuple[KernelCounters, ...]
    memory: tuple[tuple[str, int], ...]
    queued: int
    dropped: int


@dataclass(frozen=True, slots=True)
class StatsReport:
    """The answer to `Stats`."""

    id: int
    models: tuple[ModelStats, ...]


@dataclass(frozen=True, slots=True)
class PlanTotal:
    """A plan that is ready: the values of the model's symbols, and a name made of them; its runs since it was made, and
    the time of all its steps in a run."""

    name: str
    sizes: tuple[tuple[str, int], ...]
    runs: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """One step of a plan; seconds, FLOPs and bytes are per run. `result` is what it writes, as dtype and shape."""

    step: str
    op: str
    kernel: str
    result: str
    calls: int
    seconds: float
    flops: int
    bytes: int
    cached_bytes: int
    roofline: float


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """The answer to `Profile`. `plan` is the name of the one that `steps` are of; None where there is no such plan."""

    id: int
    plans: tuple[PlanTotal, ...]
    plan: str | None
    steps: tuple[StepProfile, ...]


@dataclass(frozen=True, slots=True)
class Stopped:
    """The worker is done; no report follows."""


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker's process is gone, and with it every loaded model; where `restarting`, it is started again and loads
    them again."""

    reason: str
    restarting: bool


@dataclass(frozen=True, slots=True)
class WorkerSilent:
    """The worker's process lives, but has not said anything for so many seconds, in which it says something several
    times; zero: it speaks again."""

    seconds: float


Report = (
    ModelReady
    | LoadFailed
    | InferResult
    | InferFailed
    | BatchDone
    | Unloaded
    | StatsReport
    | ProfileReport
    | Stopped
    | WorkerLost
    | WorkerSilent
)
