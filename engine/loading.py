"""From a file to a model that runs: pick the device, read, rewrite for its target, settle the precision. Holds
`engine.load`."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.cache_folder import cache_folder
from engine.errors import DeviceError, ShapeError, UnsupportedOp
from engine.feeds import free_symbols
from engine.ir.graph import Graph
from engine.ir.ops import Opaque
from engine.model import PLAN_CACHE_BYTES, Model
from engine.passes.traits import Traits
from engine.passes.unpad import Unpadded
from engine.precision import CANDIDATES, Precision, Verdict, Verdicts, decide, fingerprint, probe_sizes, source_hash
from engine.targets.base import Target
from engine.targets.cuda import probe
from engine.targets.cuda.probe import Gpu

log = logging.getLogger(__name__)

_ON_CPU = (Precision.AUTO, Precision.FP32)
_PACKED: dict[bool | str, bool | str] = {"auto": "auto", "on": True, "off": False}


def load(
    path: str | os.PathLike[str] | bytes,
    device: str = "auto",
    precision: str = "auto",
    strict: bool = False,
    threads: int | None = None,
    plan_cache_bytes: int = PLAN_CACHE_BYTES,
    packed: bool | str = "auto",
) -> Model:
    """Load an ONNX model and make it ready to run.

    `path` is an .onnx file (external data beside it is found) or its bytes. `device` is ``cpu``, ``cuda`` (the first
    usable GPU), ``cuda:N``, or ``auto``: a GPU where one can be used and has kernels for the model, else the CPU; the
    log says why a GPU was not used. `precision` is ``fp16``, ``bf16``, ``tf32``, ``fp32``, or ``auto``: fp32 on a CPU,
    where all float arithmetic is fp32 (fp64 stays fp64); on a GPU the fastest whose outputs agree with fp32 (see
    `engine.precision`). With `strict`, an operator without a kernel of ours is refused instead of run through
    onnx.reference. `threads` bounds the CPU threads (default: every core this process may use). `plan_cache_bytes`
    bounds the plans kept ready for shapes seen before. `packed` says whether encoders whose mask is an input of zeros
    and ones run on their real tokens only: ``on`` or True (where that can be proved right: `engine.passes.unpad`),
    ``off`` or False, or ``auto``: as is best on the device. Outputs that show positions have zeros at padded ones then.

    Raises ModelError (not a valid model), UnsupportedOp (valid, but not runnable here), DeviceError (no such device or
    precision there), OutOfMemory, ValueError (an argument that means nothing).
    """
    start = time.perf_counter()
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads must be an int of at least 1, not {threads!r}")
    if not isinstance(plan_cache_bytes, int) or plan_cache_bytes < 0:
        raise ValueError(f"plan_cache_bytes must be an int of at least 0, not {plan_cache_bytes!r}")
    if not isinstance(packed, bool) and packed not in _PACKED:
        raise ValueError(f"packed must be a bool or one of {', '.join(map(repr, _PACKED))}, not {packed!r}")
    if not isinstance(device, str):
        raise ValueError(f"device must be a str such as 'auto', not {device!r}")
    source = path if isinstance(path, bytes) else Path(path)
    loader = _Loader(source, strict, threads, plan_cache_bytes, _PACKED.get(packed, packed))
    wanted = _precision(precision)
    gpu = _gpu(device)
    if gpu is None:
        model = loader.on_cpu(wanted)
    else:
        try:
            model = loader.on_gpu(gpu, wanted)
        except (UnsupportedOp, DeviceError) as error:
            if device != "auto" or wanted not in _ON_CPU:
                raise
            log.warning("the model runs on the CPU, not on GPU %d (%s): %s", gpu.index, gpu.name, error)
            model = loader.on_cpu(wanted)
    # Reading leaves the file's protobuf messages in reference cycles: as much memory as the file itself.
    gc.collect()
    model.load_seconds = time.perf_counter() - start
    return model


def choose_device(device: str = "auto") -> str:
    """What `load` makes of `device` before it has seen a model: ``cpu`` or ``cuda:N``.

    Raises DeviceError for a GPU asked for that cannot be used, ValueError for a device that means nothing.
    """
    gpu = _gpu(device)
    return "cpu" if gpu is None else f"cuda:{gpu.index}"


def _gpu(device: str) -> Gpu | None:
    """The GPU that `device` names; None for the CPU."""
    if device == "cpu":
        return None
    if device == "auto":
        try:
            return probe.usable_gpu()
        except DeviceError as error:
            if probe.survey().cuda is not None:
                log.warning("the GPU is not used: %s", error)
            return None
    kind, _, number = device.partition(":")
    if kind != "cuda" or device == "cuda:" or (number and not (number.isascii() and number.isdigit())):
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<number>', not {device!r}")
    return probe.usable_gpu(int(number) if number else None)


def _precision(name: str) -> Precision:
    try:
        return Precision(name)
    except ValueError:
        names = ", ".join(repr(item.value) for item in Precision)
        raise ValueError(f"precision must be one of {names}, not {name!r}") from None


def cuda_target(gpu: Gpu, precision: Precision) -> Target:
    """The target of one GPU for models of a precision. Tests put another in its place."""
    from engine.targets.cuda.target import CudaTarget

    return CudaTarget(gpu.index, tf32=precision is Precision.TF32)


def toolchain() -> tuple[str, ...]:
    """What makes numbers of kernels, beside their sources: the versions of the driver and of the compiler. Tests put
    others in their place."""
    from engine.targets.cuda.compiler import nvrtc_version

    return probe.driver_version(), nvrtc_version()


@dataclass(frozen=True)
class _Loader:
    """One call of `load`."""

    source: Path | bytes
    strict: bool
    threads: int | None
    plan_cache_bytes: int
    packed: bool | str

    def on_cpu(self, wanted: Precision) -> Model:
        """The model on the CPU. Raises DeviceError for a precision that the CPU does not have."""
        # Imported here: the compiler and its dependencies are needed to load a model, not to name the engine's types.
        from engine.targets.cpu.target import CpuTarget

        if wanted not in _ON_CPU:
            raise DeviceError(
                f"the CPU computes in fp32; precision {wanted.value!r} needs a GPU (use 'auto' or 'fp32')"
            )
        return self._model(CpuTarget(self.threads), Precision.FP32)

    def on_gpu(self, gpu: Gpu, wanted: Precision) -> Model:
        """The model on a GPU, in the precision wanted or found out. Raises UnsupportedOp for a missing kernel."""
        if wanted is not Precision.AUTO:
            return self._checked(gpu, wanted)
        verdicts = Verdicts(cache_folder("precision"))
        key = (fingerprint(self._read()), gpu.name, str(gpu.capability), source_hash(), str(self.packed), *toolchain())
        known = verdicts.read(*key)
        if known is not None:
            log.info("precision %s, as found before", known)
            return self._checked(gpu, known.precision)
        model, verdict = self._decide(gpu)
        log.info("precision %s", verdict)
        verdicts.write(verdict, *key)
        return model

    def _checked(self, gpu: Gpu, precision: Precision) -> Model:
        """The model in a given precision, after a look whether the target has the kernels."""
        model = self._model(cuda_target(gpu, precision), precision)
        try:
            _probe(model)
        except ShapeError:
            log.info("whether every operator has a kernel was not checked: no sizes could be guessed")
        except UnsupportedOp:
            model.close()
            raise
        return model

    def _decide(self, gpu: Gpu) -> tuple[Model, Verdict]:
        """The model in the first precision that holds against the CPU."""
        with self.on_cpu(Precision.FP32) as plain:
            try:
                sizes = _probe(plain)
            except ShapeError as error:
                log.warning("the precision is not checked: no sizes could be guessed: %s", error)
                return self._checked(gpu, CANDIDATES[0]), Verdict(CANDIDATES[0], None)
            feeds = plain.sample_feeds(sizes)
            if plain.packed_mask is not None:
                # A row with padding, so that what is decided on runs packed where the model will.
                mask = feeds[plain.packed_mask]
                mask[-1, -(-mask.shape[1] // 4) :] = 0
            reference = plain.run(feeds)
        tried: list[Model] = []

        def attempt(precision: Precision) -> Mapping[str, np.ndarray]:
            for model in tried:
                model.close()
            tried.append(self._model(cuda_target(gpu, precision), precision))
            outputs = tried[-1].run(feeds)
            plain.clear_padding(outputs, feeds)  # where the GPU has run it padded
            return outputs

        try:
            verdict = decide(attempt, reference)
        except Exception:
            for model in tried:  # none where the target could not be made
                model.close()
            raise
        return tried[-1], verdict

    def _read(self) -> Graph:
        from engine import frontend

        return frontend.read(self.source)

    def _model(self, target: Target, precision: Precision) -> Model:
        from engine import passes

        traits = replace(target.traits, storage_type=precision.storage)
        graph = passes.run(self._read(), traits)
        if self.strict:
            _refuse_opaque(graph)
        model = Model(graph, target, self.plan_cache_bytes, self._unpadded(graph, traits))
        model.precision = precision.value
        return model

    def _unpadded(self, graph: Graph, traits: Traits) -> Unpadded | str:
        """The graph on packed tokens, or why there is none."""
        from engine.passes.unpad import unpad

        if self.packed is False:
            return "switched off"
        if self.packed == "auto" and traits.packed is not None and not traits.packed.by_default:
            return "switched off on this device unless asked for (packed=True)"
        return unpad(graph, traits)


def _probe(model: Model) -> dict[str, int]:
    """Sizes that the model accepts. Raises ShapeError where none could be guessed, UnsupportedOp for a missing
    kernel."""
    inputs = model.graph.inputs
    batches = {str(value.shape[0]) for value in inputs if value.shape}
    return probe_sizes(((name, name in batches) for name in free_symbols(inputs)), model.plan)


def _refuse_opaque(graph: Graph) -> None:
    for node in graph.nodes:
        if isinstance(node.op, Opaque):
            raise UnsupportedOp(
                f"node {node.origin!r}: operator {node.op.op_type} has no kernel and strict mode is on; "
                "load with strict=False to run it through onnx.reference on the host"
            )
