"""A small but honest engine: numpy models behind the same calls as the package `engine`.

A "model file" is JSON: {"kind": …} plus arguments; `KINDS` lists what there is. It checks its feeds as strictly as
the real one.
`FakeEngine.gate` can hold runs back, so that tests decide when a batch ends; `calls` records every run and `threads` on
which one it was. What a thread other than those in `SERVING` does must be inside `background`, and its runs are in
`probes`.
"""

import json
import os
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (names its types to NumPy)
import numpy as np
from numpy.typing import NDArray

from service.workers import clients
from service.workers.messages import InferResult

Array = NDArray[Any]
VOCABULARY = 100
HIDDEN = 4
SERVING = ("engine", "http")  # how names of threads begin that run batches
WIDTH = 1 << 16  # floats in a row of "wide": 256 KiB


class EngineError(Exception):
    """Root of the fake's errors."""


class ModelError(EngineError):
    """Not a model."""


class ShapeError(EngineError):
    """Wrong feeds."""


class OutOfMemory(EngineError):
    """Too large."""


class DeviceLost(EngineError):
    """The device is gone."""


@dataclass(frozen=True)
class TensorSpec:
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class KernelStat:
    kernel: str
    op: str
    launches: int
    seconds: float
    flops: float
    bytes: float
    cached_bytes: float = 0.0


@dataclass(frozen=True)
class ProfileRow:
    step: str
    kernel: str
    op: str
    calls: int
    seconds: float
    flops: int
    bytes: int
    cached_bytes: int
    roofline: float


@dataclass(frozen=True)
class PlanProfile:
    sizes: Mapping[str, int]
    rows: tuple[ProfileRow, ...]
    results: tuple[str, ...]


@dataclass(frozen=True)
class DeviceInfo:
    device: str = "cpu"
    name: str = "Fake CPU"
    arch: str = "test"
    threads: int = 1
    peak_flops: float = 1e12
    peak_bytes: float = 1e11
    peak_cache_bytes: float = 1e12


def _spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


def _identity(feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {"output": feeds["input"].copy()}


def _garbling(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Where the first number is 13, the next answer of the process it runs in is none that can be read."""
    if feeds["input"].size and feeds["input"].flat[0] == 13:
        real = clients.encode

        def garble(message: Any, *args: Any) -> bytes:
            if not isinstance(message, InferResult):
                return real(message, *args)
            clients.encode = real
            return struct.pack("<II", 1, 0) + b"?"

        clients.encode = garble  # type: ignore[assignment]
    return _identity(feeds)


def _colours(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Scores of three classes: the mean of each colour channel."""
    return {"logits": feeds["input"].mean(axis=(2, 3)).astype(np.float32)}


def _grey(feeds: Mapping[str, Array]) -> dict[str, Array]:
    mean = feeds["input"].mean(axis=(1, 2, 3))
    return {"scores": np.stack([mean, 1 - mean], axis=1).astype(np.float32)}


_TABLE = np.random.default_rng(7).standard_normal((VOCABULARY, HIDDEN)).astype(np.float32)


def _context(feeds: Mapping[str, Array]) -> Array:
    """Each token's vector plus the masked mean of its row: tokens see each other, padding is unseen."""
    ids, mask = feeds["input_ids"], feeds["attention_mask"].astype(np.float32)[:, :, None]
    outside = np.argwhere((ids < 0) | (ids >= VOCABULARY))
    if len(outside):
        raise ShapeError(
            f"input 'input_ids': token id {ids[tuple(outside[0])]} is out of range (0 to {VOCABULARY - 1})"
        )
    vectors = _TABLE[ids]
    mean = (vectors * mask).sum(axis=1, keepdims=True) / np.maximum(mask.sum(axis=1, keepdims=True), 1)
    return (vectors + mean).astype(np.float32)


def _encoder(feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {"last_hidden_state": _context(feeds)}


def _short(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """An encoder with positions for ten tokens."""
    if feeds["input_ids"].shape[1] > 10:
        raise ShapeError("the positions end at 10 tokens")
    return _encoder(feeds)


def _unmasked(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """An encoder whose mask input does nothing: padding would change its answers."""
    return {"last_hidden_state": _context({**feeds, "attention_mask": np.ones_like(feeds["attention_mask"])})}


def _maskless(feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {"last_hidden_state": _context({**feeds, "attention_mask": np.ones_like(feeds["input_ids"])})}


def _text_classes(feeds: Mapping[str, Array]) -> dict[str, Array]:
    mask = feeds["attention_mask"].astype(np.float32)[:, :, None]
    pooled = (_context(feeds) * mask).sum(axis=1) / mask.sum(axis=1)
    return {"logits": pooled[:, :2].astype(np.float32)}


def _token_classes(feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {"logits": _context(feeds)[:, :, :2]}


def _mixing(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Looks batchable, is not: every row sees the mean over the first axis."""
    return {"output": (feeds["input"] - feeds["input"].mean(axis=0, keepdims=True)).astype(np.float32)}


def _quantised(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """As dynamic quantisation does: one scale of 8 bits for the whole batch, by its largest number."""
    scale = max(1e-9, np.abs(feeds["input"]).max() / np.float32(127))
    return {"output": (np.rint(feeds["input"] / scale) * scale).astype(np.float32)}


def _places(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Rows of a table of two."""
    if feeds["input"].max(initial=0) > 1:
        raise ShapeError("input 'input': the table has two rows")
    return {"output": feeds["input"].astype(np.float32)}


def _third(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Rows from the third on see the first."""
    output = feeds["input"].copy()
    output[2:] += output[:1]
    return {"output": output}


def _halves(feeds: Mapping[str, Array]) -> dict[str, Array]:
    return {"output": (feeds["input"] / 2).astype(feeds["input"].dtype)}


def _grow(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """A mebibyte of answer for every row."""
    return {"output": np.repeat(feeds["input"], 1 << 16, axis=1)}


_IDS = (_spec("input_ids", "int64", "batch", "sequence"), _spec("attention_mask", "int64", "batch", "sequence"))
_HIDDEN = (_spec("last_hidden_state", "float32", "batch", "sequence", HIDDEN),)
_VECTOR = _spec("input", "float32", "batch", 4)
_WIDE = _spec("input", "float32", "batch", WIDTH)

Runner = Callable[[Mapping[str, Array]], dict[str, Array]]
KINDS: dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], Runner]] = {
    "identity": ((_VECTOR,), (_spec("output", "float32", "batch", 4),), _identity),
    "garbling": ((_VECTOR,), (_spec("output", "float32", "batch", 4),), _garbling),
    "wide": ((_WIDE,), (_spec("output", "float32", "batch", WIDTH),), _identity),
    "grow": ((_VECTOR,), (_spec("output", "float32", "batch", 4 << 16),), _grow),
    "fixed": ((_spec("input", "float32", 2, 4),), (_spec("output", "float32", 2, 4),), _identity),
    "mixing": ((_VECTOR,), (_spec("output", "float32", "batch", 4),), _mixing),
    "quantised": ((_VECTOR,), (_spec("output", "float32", "batch", 4),), _quantised),
    "quantised_pixels": (
        (_spec("input", "uint8", "batch", 4),),
        (_spec("output", "float32", "batch", 4),),
        _quantised,
    ),
    "places": ((_spec("input", "int32", "batch", 4),), (_spec("output", "float32", "batch", 4),), _places),
    "third": ((_VECTOR,), (_spec("output", "float32", "batch", 4),), _third),
    "half": ((_spec("input", "float16", "batch", 2),), (_spec("output", "float16", "batch", 2),), _halves),
    "fp8": ((_spec("input", "float8_e4m3fn", "n", 2),), (_spec("output", "float32", "n", 2),), _identity),
    "int32": ((_spec("input", "int32", "batch", 2),), (_spec("output", "int32", "batch", 2),), _identity),
    "bool": ((_spec("input", "bool", "batch", 2),), (_spec("output", "bool", "batch", 2),), _identity),
    "endless": (
        (_spec("input", "float32", 1 << 20, 1 << 20),),
        (_spec("output", "float32", 1 << 20, 1 << 20),),
        _identity,
    ),
    "strings": ((_spec("input", "object", "n", 2),), (_spec("output", "object", "n", 2),), _identity),
    "colours": (
        (_spec("input", "float32", "batch", 3, 8, 8),),
        (_spec("logits", "float32", "batch", 3),),
        _colours,
    ),
    "one_image": ((_spec("input", "float32", 1, 3, 8, 8),), (_spec("logits", "float32", 1, 3),), _colours),
    "grey": ((_spec("input", "float32", "n", 8, 8, 1),), (_spec("scores", "float32", "n", 2),), _grey),
    "encoder": (_IDS, _HIDDEN, _encoder),
    "short": (_IDS, _HIDDEN, _short),
    "unmasked": (_IDS, _HIDDEN, _unmasked),
    "maskless": (_IDS[:1], _HIDDEN, _maskless),
    "one_row": (
        (_spec("input_ids", "int64", 1, "sequence"),),
        (_spec("last_hidden_state", "float32", 1, "sequence", HIDDEN),),
        _maskless,
    ),
    "text_classes": (_IDS, (_spec("logits", "float32", "batch", 2),), _text_classes),
    "token_classes": (_IDS, (_spec("logits", "float32", "batch", "sequence", 2),), _token_classes),
}


class FakeModel:
    """One loaded model."""

    def __init__(self, owner: "FakeEngine", path: str, kind: str, arguments: dict[str, Any], packed: str) -> None:
        self.inputs, self.outputs, self._run = KINDS[kind]
        self.kind, self.path = kind, path
        self.device_info = DeviceInfo()
        self.fallback_ops = 0
        self.load_seconds = 0.01
        self.concurrent_runs = arguments.get("concurrent_runs", 1)
        self.divides_threads = arguments.get("divides_threads", False)
        self.size_limits: dict[str, int] = arguments.get("limits", {})
        self.packed_mask = "attention_mask" if "token_step" in arguments and packed != "off" else None
        self.closed = False
        self._owner = owner
        self._arguments = arguments
        self._launches = 0
        self._runs: Counter[tuple[tuple[str, int], ...]] = Counter()
        self._lock = threading.Lock()

    def run(
        self, feeds: Mapping[str, Array], /, on_start: Callable[[], None] = lambda: None, side_by_side: bool = False
    ) -> dict[str, Array]:
        """Check like the real engine, wait for the gate, compute."""
        assert not self.closed, "run after close"
        sizes = self._check(feeds)
        on_start()
        if threading.current_thread().name.startswith(SERVING):
            first = next(iter(feeds.values()))
            self._owner.threads.append(threading.current_thread().name)
            self._owner.calls.append((self.kind, first.shape))
            self._owner.side_by_side.append(side_by_side)
            self._owner.running.release()
            assert self._owner.gate.wait(60), "the test never opened the gate"
            if "sleep" in self._arguments:
                time.sleep(self._arguments["sleep"])
            poison = self._arguments.get("poison")
            if poison is not None and bool((first == poison).any()):
                raise self._owner.poison_error(f"{poison} makes this model fail")
            self._fail_as_told(first)
            if self._arguments.get("crash") and bool((first == -1).any()):
                raise RuntimeError("a bug in the engine")
        else:
            assert self._owner.behind.active, "a probe that does not give way"
            self._owner.probes.append((self.kind, next(iter(feeds.values())).shape))
            if "probe_error" in self._arguments:
                raise EngineError(self._arguments["probe_error"])
        outputs = self._run(feeds)
        if "answers" in self._arguments and threading.current_thread().name.startswith(SERVING):
            outputs = {name: np.full_like(array, self._arguments["answers"]) for name, array in outputs.items()}
        with self._lock:
            self._launches += 1
            self._runs[tuple(sizes.items())] += 1
        return outputs

    def computed_tokens(self, rows: int, width: int, tokens: int) -> int:
        """Rounded up to the `token_step` of a packed model, where that is less than all."""
        step = int(self._arguments["token_step"])
        return min(-(-tokens // step) * step, rows * width)

    def _fail_as_told(self, first: Array) -> None:
        """`faults` maps an element of the first input to what happens to this process when it is met."""
        for element, fault in self._arguments.get("faults", {}).items():
            if not bool((first == float(element)).any()):
                continue
            if fault == "lost":
                raise DeviceLost("an illegal address was met")
            if fault == "abort":
                print("last words of a library", flush=True)
                os.abort()
            if fault == "stuck":
                time.sleep(60)

    def _check(self, feeds: Mapping[str, Array]) -> dict[str, int]:
        """The values of the symbols."""
        if set(feeds) != {spec.name for spec in self.inputs}:
            raise ShapeError(f"inputs {sorted(feeds)}; the model has {[spec.name for spec in self.inputs]}")
        symbols: dict[str, int] = {}
        for spec in self.inputs:
            array = feeds[spec.name]
            if array.dtype != spec.dtype or array.ndim != len(spec.shape):
                raise ShapeError(f"input '{spec.name}' is {array.dtype} {array.shape}, not {spec.dtype} {spec.shape}")
            if array.dtype == object and not all(isinstance(element, str) for element in array.flat):
                raise ShapeError(f"input '{spec.name}' holds elements that are no str")
            for want, got in zip(spec.shape, array.shape, strict=True):
                if isinstance(want, str):
                    want = symbols.setdefault(want, got)
                if want != got:
                    raise ShapeError(f"input '{spec.name}' has shape {array.shape}; it takes {spec.shape}")
        return symbols

    def kernel_stats(self) -> tuple[KernelStat, ...]:
        """Two kernels, so much a launch; "flops" is what a run of the first has."""
        n = self._launches
        return (
            KernelStat("gemm_f32", "Gemm", n, n * 1e-3, n * self._arguments.get("flops", 5e8), n * 1e6, n * 1e6),
            KernelStat("pointwise_f32", "Pointwise", n, n * 1e-4, n * 1e5, n * 5e6),
        )

    def plan_profiles(self) -> tuple[PlanProfile, ...]:
        """A plan for each set of sizes; a step that does sums and one that only copies."""
        return tuple(
            PlanProfile(
                dict(sizes),
                (
                    ProfileRow("sums", "gemm_f32", "Gemm", runs, 1e-3, 5 * 10**8, 10**6, 10**6, 0.5),
                    ProfileRow("copies", "pointwise_f32", "Pointwise", runs, 1e-4, 0, 5 * 10**6, 0, 0.25),
                ),
                ("f32 [1, 4]", "f32 [4, 1]"),
            )
            for sizes, runs in self._runs.items()
        )

    def memory(self) -> dict[str, int]:
        """Bytes by kind."""
        return {"weights": 1000, "arena": 200, "plans": 30}

    def close(self) -> None:
        """Give it back."""
        self.closed = True


class Behind(threading.local):
    """Whether the thread is inside `background`."""

    active = False


@dataclass
class FakeEngine:
    """The module `engine`. `running` is released at the start of each run on the engine thread, `loading` at that of
    each load."""

    calls: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    side_by_side: list[bool] = field(default_factory=list)
    threads: list[str] = field(default_factory=list)
    probes: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    behind: Behind = field(default_factory=Behind)
    models: list[FakeModel] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    load_gate: threading.Event = field(default_factory=threading.Event)
    running: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    loading: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    poison_error: type[Exception] = ShapeError
    EngineError: type[Exception] = EngineError
    ShapeError: type[Exception] = ShapeError
    OutOfMemory: type[Exception] = OutOfMemory
    DeviceLost: type[Exception] = DeviceLost

    def __post_init__(self) -> None:
        self.gate.set()
        self.load_gate.set()

    @contextmanager
    def background(self) -> Iterator[None]:
        """Note that the thread gives way."""
        self.behind.active = True
        try:
            yield
        finally:
            self.behind.active = False

    def choose_device(self, device: str) -> str:
        """There is one GPU."""
        if device not in ("auto", "cpu", "cuda", "cuda:0"):
            raise DeviceLost(f"device '{device}' does not exist. Use another GPU or device='cpu'")
        return "cuda:0" if device.startswith("cuda") else "cpu"

    def load(
        self,
        path: str,
        *,
        device: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        packed: str = "auto",
    ) -> FakeModel:
        """Read the JSON; anything else is a ModelError."""
        assert self.behind.active, "a load that does not give way"
        self.loading.release()
        assert self.load_gate.wait(60), "the test never opened the load gate"
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            arguments = json.loads(content)
            time.sleep(arguments.get("load_sleep", 0))
            if arguments.get("fatal"):
                os.kill(os.getpid(), signal.SIGKILL)
            if arguments.get("bug"):
                raise LookupError("oops")
            model = FakeModel(self, path, arguments["kind"], arguments, packed)
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path.rsplit('/', 1)[-1]} is no ONNX model: {error}") from None
        self.models.append(model)
        return model
