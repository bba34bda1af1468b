"""Messages as bytes, blocks of shared memory, counters that outlive a process: the parts of the process transport."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest

from service.workers.clients import Connection
from service.workers.counters import LastingCounters, retired
from service.workers.messages import (
    BatchDone,
    BatchingMode,
    BatchingOptions,
    Cancel,
    Device,
    FailureCode,
    Infer,
    InferFailed,
    InferResult,
    KernelCounters,
    LoadFailed,
    LoadModel,
    LocalTensor,
    ModelKey,
    ModelReady,
    ModelStats,
    PlanTotal,
    Profile,
    ProfileReport,
    Stats,
    StatsReport,
    StepProfile,
    Stop,
    Stopped,
    TensorInfo,
    Unload,
    Unloaded,
    WorkerLost,
    WorkerSilent,
)
from service.workers.shared_memory import Blocks, Leases, RegionFull, create_region, map_region
from service.workers.wire import (
    INLINE_BYTES,
    Beat,
    Counted,
    Dying,
    FrameReader,
    FromEngine,
    LogLine,
    Release,
    Starved,
    ToEngine,
    WireError,
    decode_command,
    decode_report,
    encode,
)

KEY = ModelKey("a model", 3)
COUNTERS = (KernelCounters("gemm", "Gemm", 2, 0.5, 1e9, 1e6, 1e5, 0.1, 0.2),)


class Pair:
    """A region with its writer and its reader."""

    def __init__(self, nbytes: int = 1 << 20) -> None:
        descriptor = create_region(nbytes)
        self.blocks = Blocks(map_region(descriptor))
        self.leases = Leases(map_region(descriptor), self.blocks.give_back)
        os.close(descriptor)

    def through(self, message: ToEngine | FromEngine, cut: int = 1 << 20) -> Any:
        """The message after the wire, its bytes arriving in pieces."""
        data = encode(message, self.blocks)
        reader = FrameReader()
        frames = [frame for i in range(0, len(data), cut) for frame in reader.feed(data[i : i + cut])]
        ((text, payload),) = frames
        decode: Any = decode_command if isinstance(message, get_args(ToEngine)) else decode_report
        return decode(text, payload, self.leases)


def infer(*arrays: np.ndarray) -> Infer:
    inputs = tuple((f"input {i}", LocalTensor(array)) for i, array in enumerate(arrays))
    return Infer(7, KEY, inputs, ("y", "z"), (3, 1), 12.5, float("inf"), 50)


MESSAGES = [
    LoadModel(KEY, "/m/ö.onnx", "cuda:1", "auto", None, BatchingOptions(buckets=(4, 8)), (224, 192)),
    LoadModel(KEY, "m", "cpu", "fp32", 4, BatchingOptions(), None, "off"),
    Cancel(2**40),
    Unload(KEY),
    Stats(1),
    Counted((ModelStats(KEY, COUNTERS, (), 0, 2),)),
    Profile(1, KEY, None),
    Profile(1, KEY, "batch=1,sequence=16"),
    Stop(),
    ModelReady(
        KEY,
        (TensorInfo("x", np.dtype(np.float16), ("batch", 3, "height")),),
        (TensorInfo("y", np.dtype(ml_dtypes.bfloat16), ()), TensorInfo("s", np.dtype(object), (1,))),
        Device("cuda:0", "GPU", "sm_90a", 0, 1e15, 3e12, 6e12),
        0.25,
        0,
        BatchingMode.PADDED,
        "because",
    ),
    LoadFailed(KEY, "no"),
    LoadFailed(KEY, "no disk", unread=True),
    InferFailed(1, FailureCode.OVERLOADED, "full", 1.5),
    InferFailed(1, FailureCode.ENGINE, "bad"),
    BatchDone(KEY, 4, 0, 0, 1e-3, 7),
    Unloaded(KEY),
    ProfileReport(1, (), None, ()),
    ProfileReport(
        1,
        (PlanTotal("batch=2", (("batch", 2),), 3, 0.5),),
        "batch=2",
        (StepProfile("a + b", "Conv", "conv", "f32 [2, 3]", 3, 0.5, 1 << 50, 7, 6, 0.25),),
    ),
    StatsReport(1, (ModelStats(KEY, COUNTERS, (("weights", 1 << 40),), 1, 2),)),
    Stopped(),
    WorkerLost("gone", restarting=True),
    WorkerSilent(4.5),
    Release(64),
    Beat(0.0),
    Starved(),
    LogLine(20, "engine", "two\nlines"),
    Dying("a device"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
def test_messages_cross_unchanged(message: ToEngine | FromEngine, cut: int) -> None:
    assert Pair().through(message, cut) == message


def test_every_kind_of_message_is_tested() -> None:
    kinds = {*get_args(ToEngine), *get_args(FromEngine)} - {Infer, InferResult}
    assert {type(message) for message in MESSAGES} == kinds


TENSORS = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.arange(24, dtype=np.int64).reshape(2, 3, 4)[:, ::2, ::-1],
    np.array(3.5),
    np.zeros((0, 5), np.int8),
    np.array([[True, False]]),
    np.arange(6).astype(ml_dtypes.bfloat16),
    np.array([[b"\xff\x00", "ü", b""]], object),
    np.random.default_rng(0).standard_normal((3, 200, 200)).astype(np.float16),
]


def test_tensors_cross_inline_and_through_shared_memory() -> None:
    pair = Pair()
    for arrays in ([tensor] for tensor in TENSORS[:-1]):
        assert same(pair.through(infer(*arrays)), arrays)
        assert pair.blocks.used == 0
    assert same(pair.through(infer(*TENSORS)), TENSORS)
    small = np.zeros(INLINE_BYTES, np.uint8)
    for array, inline in ((small, True), (np.zeros(INLINE_BYTES + 1, np.uint8), False)):
        answer = pair.through(InferResult(1, (("y", LocalTensor(array)),), 0.0, 0.0))
        assert (pair.blocks.used == 0) == inline
        del answer
    assert pair.blocks.used == 0


def same(message: Infer, arrays: list[np.ndarray]) -> bool:
    got = [tensor.view() for _, tensor in message.inputs]
    assert [(a.dtype, a.shape) for a in got] == [(a.dtype, a.shape) for a in arrays]
    assert message.deadline == float("inf") and message.lengths == (3, 1)
    return all(np.array_equal(a, b) for a, b in zip(got, arrays, strict=True))


def test_a_block_is_free_when_the_last_view_of_it_is_gone() -> None:
    pair = Pair()
    message = pair.through(infer(TENSORS[-1]))
    view = message.inputs[0][1].view()[1:, ::2].T
    del message
    assert pair.blocks.used > 0 and np.array_equal(view, TENSORS[-1][1:, ::2].T)
    del view
    assert pair.blocks.used == 0


def test_shared_tensors_are_read_only() -> None:
    message = Pair().through(infer(TENSORS[-1]))
    with pytest.raises(ValueError, match="read-only"):
        message.inputs[0][1].view()[0] = 1


def test_bytes_that_are_no_message_are_refused() -> None:
    pair = Pair()
    source = random.Random(0)
    whole = encode(infer(TENSORS[0]), pair.blocks)[8:]
    for _ in range(2000):
        broken = bytearray(whole)
        for _ in range(source.randint(1, 4)):
            broken[source.randrange(len(broken))] = source.randrange(256)
        cut = source.randrange(len(broken))
        with contextlib.suppress(WireError):
            decode_command(bytes(broken[:cut]), bytes(broken[cut:]), pair.leases)
    for text in (b'["WorkerLost", ["x"], null]', b'["eval", ["1"], null]', b'["Cancel", ["1"], null]', b"[]", b"{}"):
        with pytest.raises(WireError):
            decode_command(text, b"", pair.leases)
    with pytest.raises(WireError):
        decode_command(b'["Cancel", [1], [1048576, 64]]', b"", pair.leases)
    with pytest.raises(WireError):
        list(FrameReader().feed(struct.pack("<II", 2**31, 0)))


# ---- blocks


def test_blocks_never_overlap_and_come_back_whole() -> None:
    source = random.Random(1)
    pair = Pair(1 << 16)
    held: dict[int, tuple[np.ndarray, int]] = {}
    for number in range(3000):
        if held and source.random() < 0.5:
            start = source.choice(list(held))
            block, mark = held.pop(start)
            assert (block == mark).all()
            pair.blocks.give_back(start)
        else:
            try:
                start, block = pair.blocks.take(source.randint(1, 9000))
            except RegionFull:
                continue
            assert start % 64 == 0 and start not in held
            block[:] = number % 251
            held[start] = block, number % 251
    for start in held:
        pair.blocks.give_back(start)
    assert pair.blocks.used == 0
    pair.blocks.take(1 << 16)


def test_a_full_region_says_whether_waiting_helps() -> None:
    pair = Pair(1 << 12)
    with pytest.raises(RegionFull) as caught:
        pair.blocks.take((1 << 12) + 1)
    assert caught.value.never
    start, _ = pair.blocks.take(1 << 12)
    with pytest.raises(RegionFull) as caught:
        pair.blocks.take(1, wait=0.01)
    assert not caught.value.never
    pair.blocks.give_back(start)
    pair.blocks.give_back(start)
    pair.blocks.give_back(12345)
    assert pair.blocks.take(1)[0] == 0


def test_texts_that_are_not_utf_8_arrive_escaped() -> None:
    pair = Pair()
    path = os.fsdecode(b"/m/mod\xe8le.onnx")
    command = LoadModel(KEY, path, "cpu", "auto", None, BatchingOptions(), None)
    assert pair.through(command) == replace(command, path="/m/mod\\udce8le.onnx")
    assert pair.through(LoadFailed(KEY, path)).reason == "/m/mod\\udce8le.onnx"


# ---- connections


def test_a_connection_of_which_not_all_came_is_none() -> None:
    """The kernel drops descriptors where a process may open no more files."""
    ends = socket.socketpair()
    with pytest.raises(OSError, match="ulimit"):
        Connection.of([ends[0].detach()])
    assert ends[1].recv(1) == b""  # and what did come is closed
    ends[1].close()


# ---- counters


def counted(launches: int, dropped: int = 0) -> ModelStats:
    kernel = KernelCounters("gemm", "Gemm", launches, *(launches * each for each in (0.5, 2.0, 3.0, 1.0, 0.25, 0.125)))
    return ModelStats(KEY, (kernel,), (("weights", 5),), 1, dropped)


def test_counters_go_on_where_the_last_process_ended() -> None:
    counters = LastingCounters()
    assert counters.report(StatsReport(1, (counted(10, 1),))).models == (counted(10, 1),)
    (between,) = retired([counted(10, 1)])
    assert between.kernels[0].launches == 10 and between.memory == () and between.queued == 0
    counters.begin([between])
    assert counters.report(StatsReport(2, ())).models == (between,)
    (after,) = counters.report(StatsReport(3, (counted(4, 2),))).models
    assert after.kernels == (KernelCounters("gemm", "Gemm", 14, 7.0, 28.0, 42.0, 14.0, 3.5, 1.75),)
    assert after.dropped == 3 and after.memory == (("weights", 5),)
    counters.begin(retired(retired([after])))
    assert counters.report(StatsReport(4, (counted(1),))).models[0].kernels[0].launches == 15
    counters.forget(KEY)
    assert counters.report(StatsReport(5, (counted(1),))).models[0].kernels[0].launches == 1


def test_a_process_without_an_engine_knows_every_type() -> None:
    """NumPy knows bfloat16 once somebody has imported ml_dtypes; a front end has no engine that does."""
    code = "import numpy, service.frontend, service.workers.wire; print(numpy.dtype('bfloat16').name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "bfloat16\n", done.stderr
