"""The thread pool of the process and the programs that run on it. `codegen/executor.py` is the native half.

One pool serves all models of the process; one program runs at a time, and a program in the background gives way to
others between two tasks (`engine.background`). Where two programs are to run side by side, each gets a part of the pool
(`Pool.part`), which is a pool of its own. Workers are Python threads that never leave native code: they sleep on a
condition variable when there is nothing to do and use no CPU time then.
After a fork, the child starts a pool of its own when it first runs something; the parent's is untouched.
"""

from __future__ import annotations

import atexit
import copy
import ctypes
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.background import Turns, in_background
from engine.errors import DeviceError
from engine.targets.cpu.codegen import executor as native
from engine.targets.cpu.codegen.isa import host_isa
from engine.targets.cpu.jit import compiler
from engine.targets.cpu.kernel import SLOT_BYTES, Launch, Pointer, StatusWord

_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_WORKER = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
_WORD = 8

PARTS = 2
"""Of a pool. Two runs side by side need no barrier between their threads, and each finds its data in its own cores'
caches; what more of them would gain where there are many cores is not measured."""


def available_cores() -> int:
    """Physical cores this process may use: those of its CPU affinity, limited by the cgroup's quota."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = len({_siblings(number) for number in os.sched_getaffinity(0)})
    return max(1, min(cores, _quota() or cores))


def _siblings(number: int) -> str:
    """The logical processors of the core of processor `number`, as the system names them: two threads of a core share
    its multipliers."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(number)


def _quota() -> int | None:
    """Whole processors that the cgroup (version 2, then 1) grants; None where it does not limit them."""
    root = Path("/sys/fs/cgroup")
    for files in ((root / "cpu.max",), (root / "cpu/cpu.cfs_quota_us", root / "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join(path.read_text() for path in files).split()
            if int(quota) > 0:
                return max(1, int(quota) // int(period))
        except (OSError, ValueError):
            continue
    return None


_Byte = ctypes.c_char


def aligned_bytes(nbytes: int) -> np.ndarray:
    """Uninitialised memory whose address is a multiple of 64."""
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]


def _aligned_words(count: int) -> np.ndarray:
    words = aligned_bytes(count * _WORD).view(np.int64)
    words[:] = 0
    return words


def _copied(words: np.ndarray) -> np.ndarray:
    copied = _aligned_words(words.size).reshape(words.shape)
    copied[:] = words
    return copied


def address(array: np.ndarray) -> int:
    """Where the array's first element lies."""
    flags = array.flags
    if flags.writeable and flags.c_contiguous and array.nbytes:
        try:
            return ctypes.addressof(_Byte.from_buffer(array))  # type: ignore[arg-type]  # in a fifth of the time
        except ValueError:  # a dtype that buffers do not have
            pass
    return int(array.__array_interface__["data"][0])


class Pool:
    """Worker threads and their scratch memory. Get the process's pool with `pool()`."""

    def __init__(self, parts: int = 0) -> None:
        """`parts`: how many programs may run side by side, each in a part."""
        if os.name != "posix":
            raise DeviceError("the CPU target needs POSIX threads, which this system does not have")
        isa = host_isa()
        run, worker = native.RunCode(isa), native.WorkerCode(isa)
        addresses = compiler().load([run, worker])
        self._run = _RUN(addresses[run.symbol])
        self._worker = _WORKER(addresses[worker.symbol])
        self._block = _aligned_words(native.POOL_BYTES // _WORD)
        self._address = address(self._block)
        libc = ctypes.CDLL(None)
        mutex, condition = self._address + native.POOL_MUTEX, self._address + native.POOL_CONDITION
        if libc.pthread_mutex_init(ctypes.c_void_p(mutex), None) or libc.pthread_cond_init(
            ctypes.c_void_p(condition), None
        ):
            raise DeviceError("the thread pool cannot be set up: pthread_mutex_init failed")
        self._threads: list[threading.Thread] = []
        self._scratch = aligned_bytes(0)
        self._scratch_address = address(self._scratch)
        self._scratch_stride = 0
        self._turns = Turns(self._set_wanted)
        self._parts = [Pool() for _ in range(parts)]
        self._free_parts: queue.LifoQueue[int] = queue.LifoQueue()
        for number in range(parts):
            self._free_parts.put(number)
        self._clock = _SharedClock()

    def _set_wanted(self, wanted: bool) -> None:
        self._block[native.POOL_WANTED // _WORD] = wanted

    def run(self, program: Program) -> None:
        """Run a program to its end, when its turn comes. The caller works as thread 0; the GIL is released.

        One thread at a time may run a program; different programs may be run by different threads.
        """
        if not in_background():
            self._turn(program, native.FOREGROUND)
            return
        mode = native.BACKGROUND
        while not self._turn(program, mode):
            mode = native.CONTINUED

    @contextmanager
    def part(self) -> Iterator[Part]:
        """A part that nobody else has meanwhile; waits until one is free. What runs in the background gives way to it,
        as to a program that has the whole pool; a program of the foreground does not."""
        number = self._free_parts.get()
        try:
            with self._turns.kept_from_background():
                began = self._clock.count(1)
                try:
                    yield Part(number, self._parts[number], self._clock, began)
                finally:
                    self._clock.count(-1)
        finally:
            self._free_parts.put(number)

    def _turn(self, program: Program, mode: int) -> bool:
        """Run a program until it is done or gives way; whether it is done."""
        with self._turns:
            self._make_room(program)
            program.job[native.JOB_MODE // _WORD] = mode
            self._run(self._address, program.job_address)
            return not program.job[native.JOB_STOPPED // _WORD]

    def _make_room(self, program: Program) -> None:
        """Threads and scratch memory for a program, which may have been another's between two turns."""
        while len(self._threads) + 1 < program.threads:
            self._start_worker()
        needed = program.scratch_bytes
        if needed > self._scratch_stride or self._scratch.nbytes < self._scratch_stride * program.threads:
            self._scratch_stride = max(needed, self._scratch_stride)
            self._scratch = aligned_bytes(self._scratch_stride * max(program.threads, len(self._threads) + 1))
            self._scratch_address = address(self._scratch)
        program.job[native.JOB_SCRATCH // _WORD] = self._scratch_address
        program.job[native.JOB_SCRATCH_STRIDE // _WORD] = self._scratch_stride

    @property
    def scratch_bytes(self) -> int:
        return self._scratch.nbytes + sum(part.scratch_bytes for part in self._parts)

    def _start_worker(self) -> None:
        number = len(self._threads) + 1
        thread = threading.Thread(
            target=self._worker, args=(self._address, number), name=f"tilewave-{number}", daemon=True
        )
        thread.start()
        self._threads.append(thread)

    def stop(self) -> None:
        """End the workers. For the end of the process: native threads must not outlive the code they run, and a program
        in the background that gave way for this gets no further turn."""
        self._turns.__enter__()
        self._block[native.POOL_STOP // _WORD] = 1
        if self._threads:
            empty = Program([], 1)
            empty.threads = 2  # which wakes them
            empty.prepare()
            self._run(self._address, empty.job_address)
        for thread in self._threads:
            thread.join()
        self._threads = []
        for part in self._parts:
            part.stop()


class _SharedClock:
    """Two clocks: seconds as they are, and such that pass more slowly the more parts are in use, 1/k of one while k
    are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used = 0
        self._seconds = 0.0
        self._counted_until = time.monotonic()

    def count(self, change: int = 0) -> tuple[float, float]:
        """What both show now; from now on so many more parts are in use."""
        with self._lock:
            now = time.monotonic()
            if self._used:
                self._seconds += (now - self._counted_until) / self._used
            self._counted_until = now
            self._used += change
            return now, self._seconds


@dataclass(frozen=True)
class Part:
    """A part of a pool, by number, that somebody has."""

    number: int
    pool: Pool
    _clock: _SharedClock
    _began: tuple[float, float]

    def share(self) -> float:
        """How much of the time since it was taken counts as the whole pool's: 1 where nobody had another part, a half
        where somebody did all along."""
        now, shared = self._clock.count()
        seconds = now - self._began[0]
        return (shared - self._began[1]) / seconds if seconds else 1.0


@dataclass
class _PoolCache:
    """The process's pool, made on first use."""

    pool: Pool | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_cache = _PoolCache()


def pool() -> Pool:
    """The process's pool."""
    with _cache.lock:
        if _cache.pool is None:
            _cache.pool = Pool(PARTS)
        return _cache.pool


def _forget_pool() -> None:
    _cache.pool = None
    _cache.lock = threading.Lock()


def _stop_pool() -> None:
    if _cache.pool is not None:
        _cache.pool.stop()
        _cache.pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
atexit.register(_stop_pool)


def _most_tasks(steps: Sequence[Sequence[Launch]]) -> int:
    """The most tasks that may run at a time; at least 1."""
    most = 1
    for step in steps:
        group = 0
        for launch in step:
            group = group + launch.tasks if launch.concurrent else launch.tasks
            most = max(most, group)
    return most


class Program:
    """Launches in the form that the native executor walks.

    `slots` holds the arguments of all launches; `pointers` says which slots are addresses, in the same order as
    `pointer_slots`: the owner fills those in before a run. `statistics` (runs and nanoseconds) and `status` (not 0
    where a kernel met a value that makes the answer wrong) are per step.
    """

    def __init__(self, steps: Sequence[Sequence[Launch]], threads: int) -> None:
        launches = [launch for step in steps for launch in step]
        self.threads = min(threads, _most_tasks(steps))  # to wake one for nothing costs more than a small task
        self.scratch_bytes = max((-(-launch.scratch_bytes // 64) * 64 for launch in launches), default=0)
        self.statistics = _aligned_words(2 * max(1, len(steps)))
        self.status = _aligned_words(max(1, len(steps)))
        self.pointers: list[Pointer] = []
        self._launches = launches
        self._steps = steps
        self._build()

    def _build(self) -> None:
        values = [slot for launch in self._launches for slot in launch.args]
        owners = [number for number, step in enumerate(self._steps) for launch in step for _ in launch.args]
        self.slots = _aligned_words(max(1, len(values)))
        positions: list[int] = []
        statuses: list[int] = []
        for i, slot in enumerate(values):
            if isinstance(slot, Pointer):
                self.pointers.append(slot)
                positions.append(i)
            elif isinstance(slot, StatusWord):
                self.slots[i] = address(self.status) + _WORD * owners[i]
                statuses.append(i)
            elif isinstance(slot, float):
                # Both halves hold what kernels may read: the single in the lower, which is all they load of it.
                self.slots[i] = int(np.float32(slot).view(np.uint32))
            else:
                self.slots[i] = slot
        self.pointer_slots = np.asarray(positions, np.intp)
        self._status_slots = np.asarray(statuses, np.intp)

    def prepare(self) -> None:
        """Compile and lay out the program. Needed once before the first run."""
        addresses = compiler().load([launch.spec for launch in self._launches])
        lines = native.ENTRY_BYTES // _WORD
        table = _aligned_words(max(1, len(self._launches)) * lines).reshape(-1, lines)
        argument = address(self.slots)
        row = group = 0
        for number, step in enumerate(self._steps):
            for i, launch in enumerate(step):
                if i == 0 or not launch.concurrent:
                    group = row
                ends = i + 1 == len(step) or not step[i + 1].concurrent
                entry = table[row]
                entry[native.ENTRY_FUNCTION // _WORD] = addresses[launch.spec.symbol]
                entry[native.ENTRY_ARGS // _WORD] = argument
                entry[native.ENTRY_TASKS // _WORD] = launch.tasks
                entry[native.ENTRY_GROUP // _WORD] = group
                entry[native.ENTRY_GROUP_END // _WORD] = ends
                entry[native.ENTRY_STEP // _WORD] = number
                entry[native.ENTRY_STEP_END // _WORD] = i + 1 == len(step)
                if ends:
                    members = slice(group, row + 1)
                    table[members, native.ENTRY_GROUP_TASKS // _WORD] = table[
                        members, native.ENTRY_TASKS // _WORD
                    ].sum()
                argument += len(launch.args) * SLOT_BYTES
                row += 1
        self._table = table
        self._make_job(len(self._launches))

    def on(self, threads: int) -> Program:
        """A prepared program once more, which may run beside this one, on at most so many threads. Its statistics begin
        at 0; its moving pointers are those that this one has now."""
        other = copy.copy(self)
        other.threads = min(threads, self.threads)
        other.slots, other._table = _copied(self.slots), _copied(self._table)
        other.status, other.statistics = _aligned_words(len(self.status)), _aligned_words(len(self.statistics))
        other.slots[self._status_slots] += address(other.status) - address(self.status)
        other._table[:, native.ENTRY_ARGS // _WORD] += address(other.slots) - address(self.slots)
        other._make_job(int(self.job[native.JOB_COUNT // _WORD]))
        return other

    def _make_job(self, launches: int) -> None:
        """The counters, and what the native half is handed of this program."""
        words = native.LINE // _WORD
        self._counters = _aligned_words(max(1, launches) * (self.threads + 1) * words)
        self.job = _aligned_words(native.JOB_BYTES // _WORD)
        self.job[native.JOB_PROGRAM // _WORD] = address(self._table)
        self.job[native.JOB_COUNT // _WORD] = launches
        self.job[native.JOB_THREADS // _WORD] = self.threads
        self.job[native.JOB_COUNTERS // _WORD] = address(self._counters)
        self.job[native.JOB_STATISTICS // _WORD] = address(self.statistics)
        self.job_address = address(self.job)

    def forget_sources(self) -> None:
        """Keep only what a run needs. To be called once prepared and with all pointers filled in: launches hold the
        tensors and expressions of their steps, many times the memory of the tables."""
        self._launches, self._steps, self.pointers = [], [], []
        self.pointer_slots = self.pointer_slots[:0]

    @property
    def nbytes(self) -> int:
        """Memory of the tables."""
        return sum(a.nbytes for a in (self.slots, self._table, self._counters, self.job, self.statistics))
