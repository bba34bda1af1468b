"""The native half of the runtime: runs a program of launches on a pool of threads without Python.

A program is a table of entries, one per launch. Every thread walks the table. Of each launch it takes tasks from its
own share of the range, so that neighbouring steps find their data in the same core's cache, then from the shares of
others, so that a core that is late or stolen only costs the task it holds. A thread goes on to the next launch when
all tasks of the launch (and of the launches that may run beside it) are done; it spins briefly and then sleeps on a
condition variable. The caller's thread is number 0 and needs nobody else: workers that wake too late find nothing
left to do.

A job in the background gives way: when somebody else wants the pool (`POOL_WANTED`), its threads take no further task,
and the run ends with `JOB_STOPPED` set. The counters stay as they are, so that the next run of the job, marked
`CONTINUED`, passes over what is done.

Layouts below are in bytes; words that different threads write lie on cache lines of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from engine.targets.cpu.codegen.emit import Builder, Int, Module, Value
from engine.targets.cpu.kernel import Code

LINE = 64

# The pool: shared by all threads.
POOL_SEQUENCE = 0  # counts jobs; workers wait for a change
POOL_STATE = LINE  # OPEN while a job may be joined, plus the number of workers inside
POOL_WAITERS = 2 * LINE  # threads that sleep, or are about to
POOL_JOB = 3 * LINE  # pointer to the job
POOL_MUTEX = 4 * LINE  # pthread_mutex_t: 40 bytes in glibc, 64 in macOS
POOL_CONDITION = 6 * LINE  # pthread_cond_t: 48 bytes in both
POOL_STOP = 8 * LINE
POOL_WANTED = 9 * LINE  # not 0 while somebody waits for a job in the background to give way
POOL_BYTES = 10 * LINE

# A job: what one run executes. Constant while it runs, but for `STOPPED`: 1 once it has begun to give way.
JOB_PROGRAM, JOB_COUNT, JOB_THREADS, JOB_COUNTERS, JOB_SCRATCH, JOB_SCRATCH_STRIDE, JOB_STATISTICS = range(0, 56, 8)
JOB_MODE = 56  # FOREGROUND, BACKGROUND, or CONTINUED: in the background, and not for the first time
JOB_STOPPED = LINE
JOB_BYTES = 2 * LINE
FOREGROUND, BACKGROUND, CONTINUED = range(3)

# An entry of a program. `GROUP` is the first launch of those that run side by side: it holds their common count of
# finished tasks. `GROUP_TASKS` is the number of tasks of the whole group. `GROUP_END` and `STEP_END` are 1 in the last
# launch of a group and of a step, else 0.
ENTRY_FUNCTION, ENTRY_ARGS, ENTRY_TASKS, ENTRY_GROUP, ENTRY_GROUP_TASKS, ENTRY_GROUP_END = range(0, 48, 8)
ENTRY_STEP, ENTRY_STEP_END = range(48, 64, 8)
ENTRY_BYTES = LINE

# Counters: per launch one line for the finished tasks of its group and the time when they were (`STAMP`), then one per
# thread for the tasks taken from its share.
# Statistics: per step two words, runs and nanoseconds.

STAMP = 8
_OPEN = 1 << 40
_SPIN_NANOSECONDS = 60_000  # about the price of sleeping and being woken
_CLOCK_MONOTONIC = 6 if sys.platform == "darwin" else 1


@dataclass(frozen=True)
class RunCode(Code):
    """``void run(ptr pool, ptr job)``: called by the thread that wants the result, which becomes thread 0."""

    family: ClassVar[str] = "executor_run"

    def ir(self) -> str:
        module = Module(self.isa)
        _define_wait(module)
        _define_execute(module)

        def run(b: Builder, values: list[Value]) -> None:
            pool, job = values
            threads = b.load("i64", b.offset(job, JOB_THREADS), 8)
            lines = b.mul(b.load("i64", b.offset(job, JOB_COUNT), 8), b.add(threads, 1))
            counters = b.load("ptr", b.offset(job, JOB_COUNTERS), 8)

            def begin() -> None:
                b.loop(0, b.mul(lines, LINE), LINE, lambda i, _: b.store(b.i64(0), b.offset(counters, i), 8))

            b.branch(b.compare("eq", b.load("i64", b.offset(job, JOB_MODE), 8), CONTINUED), lambda: None, begin)
            b.store(b.i64(0), b.offset(job, JOB_STOPPED), 8)
            state = b.offset(pool, POOL_STATE)
            clock = b.stack(16, 16)
            start = b.i64(_now(b, clock))

            def with_workers() -> None:
                b.store(job, b.offset(pool, POOL_JOB), 8)
                b.atomic_add(state, _OPEN)
                b.atomic_add(b.offset(pool, POOL_SEQUENCE), 1)
                _wake(b, pool)

            alone = b.compare("eq", threads, 1)
            b.branch(alone, lambda: None, with_workers)
            b.call_local("execute", "void", pool, job, b.i64(0))

            def close() -> None:
                b.atomic_add(state, -_OPEN)
                # The counters may be set to zero again only when nobody looks at them.
                b.call_local("wait_for", "void", pool, state, b.i64(0))

            b.branch(alone, lambda: None, close)
            _account(b, job, start, clock)

        module.function(self.symbol, [("pool", "ptr"), ("job", "ptr")], run)
        return module.text()


@dataclass(frozen=True)
class WorkerCode(Code):
    """``void worker(ptr pool, i64 me)``: the life of worker `me` (from 1), until the pool is stopped."""

    family: ClassVar[str] = "executor_worker"

    def ir(self) -> str:
        module = Module(self.isa)
        _define_wait(module)
        _define_execute(module)

        def worker(b: Builder, values: list[Value]) -> None:
            pool, me = values
            state, sequence = b.offset(pool, POOL_STATE), b.offset(pool, POOL_SEQUENCE)

            def turn(carried: list[Value]) -> tuple[Value, list[Value]]:
                _wait_until(b, pool, lambda: b.compare("ne", b.atomic_load(sequence), carried[0]))
                now = b.atomic_load(sequence)
                before = b.atomic_add(state, 1)

                def join() -> None:
                    job = b.load("ptr", b.offset(pool, POOL_JOB), 8)
                    wanted = b.compare("slt", me, b.load("i64", b.offset(job, JOB_THREADS), 8))
                    b.branch(wanted, lambda: _discard(b.call_local("execute", "void", pool, job, me)))

                b.branch(b.compare("sge", before, _OPEN), join)
                b.atomic_add(state, -1)
                _wake(b, pool)
                stop = b.atomic_load(b.offset(pool, POOL_STOP))
                return b.compare("eq", stop, 0), [now]

            b.repeat(turn, [b.i64(0)])

        module.function(self.symbol, [("pool", "ptr"), ("me", "i64")], worker)
        return module.text()


def _discard(_: Value) -> None:
    return None


def _now(b: Builder, place: Value) -> Int:
    """Nanoseconds of the monotonic clock; `place` is 16 bytes of stack."""
    b.call("clock_gettime", "i32", Value(str(_CLOCK_MONOTONIC), "i32"), place)
    return b.add(b.mul(b.load("i64", place, 8), 1_000_000_000), b.load("i64", b.offset(place, 8), 8))


def _pause(b: Builder) -> None:
    if b.isa.name == "neon":
        b.call("llvm.aarch64.hint", "void", Value("1", "i32"))
    elif b.isa.x86:
        b.call("llvm.x86.sse2.pause", "void")


def _wake(b: Builder, pool: Value) -> None:
    """Wake the sleepers after a word has changed. Costs one load when nobody sleeps."""
    mutex = b.offset(pool, POOL_MUTEX)

    def broadcast() -> None:
        b.call("pthread_mutex_lock", "i32", mutex)
        b.call("pthread_cond_broadcast", "i32", b.offset(pool, POOL_CONDITION))
        b.call("pthread_mutex_unlock", "i32", mutex)

    b.branch(b.compare("ne", b.atomic_load(b.offset(pool, POOL_WAITERS)), 0), broadcast)


def _wait_until(b: Builder, pool: Value, holds: Callable[[], Value]) -> None:
    """Spin, then sleep, until `holds`. Whoever makes it true calls `_wake` afterwards.

    No wake-up is lost: a sleeper announces itself before it looks at the word for the last time, the other side changes
    the word before it looks for sleepers, and both are sequentially consistent.
    """

    def wait() -> None:
        clock = b.stack(16, 16)
        deadline = b.add(_now(b, clock), _SPIN_NANOSECONDS)

        def spin(_: list[Value]) -> tuple[Value, list[Value]]:
            def turn(_i: Value, carried: list[Value]) -> list[Value]:
                def pause() -> list[Value]:
                    _pause(b)
                    return [holds()]

                return b.branch(carried[0], lambda: [carried[0]], pause)

            (ready,) = b.loop(0, 16, 1, turn, [Value("false", "i1")])
            late = b.compare("sge", _now(b, clock), deadline)
            finished = b.emit(f"or i1 {ready.text}, {late.text}", "i1")
            return b.emit(f"xor i1 {finished.text}, true", "i1"), []

        b.repeat(spin)
        b.branch(holds(), lambda: None, sleep)

    def sleep() -> None:
        mutex, waiters = b.offset(pool, POOL_MUTEX), b.offset(pool, POOL_WAITERS)
        b.atomic_add(waiters, 1)
        b.call("pthread_mutex_lock", "i32", mutex)

        def turn(_: list[Value]) -> tuple[Value, list[Value]]:
            def again() -> list[Value]:
                b.call("pthread_cond_wait", "i32", b.offset(pool, POOL_CONDITION), mutex)
                return [Value("true", "i1")]

            (more,) = b.branch(holds(), lambda: [Value("false", "i1")], again)
            return more, []

        b.repeat(turn)
        b.call("pthread_mutex_unlock", "i32", mutex)
        b.atomic_add(waiters, -1)

    b.branch(holds(), lambda: None, wait)


def _define_wait(module: Module) -> None:
    """``wait_for(pool, word, value)``: returns when the word has the value; ``wait_or_stop(pool, word, value, job)``:
    also when the job gives way."""

    def wait_for(b: Builder, values: list[Value]) -> None:
        pool, word, target = values
        _wait_until(b, pool, lambda: b.compare("eq", b.atomic_load(word), target))

    def wait_or_stop(b: Builder, values: list[Value]) -> None:
        pool, word, target, job = values

        def holds() -> Value:
            reached = b.compare("eq", b.atomic_load(word), target)
            return b.emit(f"or i1 {reached.text}, {_stopped(b, job).text}", "i1")

        _wait_until(b, pool, holds)

    parameters = [("pool", "ptr"), ("word", "ptr"), ("target", "i64")]
    module.function("wait_for", parameters, wait_for, local=True)
    module.function("wait_or_stop", [*parameters, ("job", "ptr")], wait_or_stop, local=True)


def _define_execute(module: Module) -> None:
    """``execute(pool, job, me)``: walk the program as thread `me`."""

    def build(b: Builder, values: list[Value]) -> None:
        pool, job, me = values

        def field(name: int, type_: str = "i64") -> Value:
            return b.load(type_, b.offset(job, name), 8)

        program, counters = field(JOB_PROGRAM, "ptr"), field(JOB_COUNTERS, "ptr")
        threads, count = field(JOB_THREADS), field(JOB_COUNT)
        scratch = b.offset(field(JOB_SCRATCH, "ptr"), b.mul(me, field(JOB_SCRATCH_STRIDE)))
        clock = b.stack(16, 16)
        counter_stride = b.mul(b.add(threads, 1), LINE)
        gives_way = b.compare("ne", field(JOB_MODE), FOREGROUND)

        def may_take() -> Value:
            """Whether the job goes on. Once it is seen to be wanted elsewhere it does not, for all threads."""

            def look() -> list[Value]:
                def stop() -> None:
                    b.atomic_store(1, b.offset(job, JOB_STOPPED))
                    _wake(b, pool)

                b.branch(b.compare("ne", b.atomic_load(b.offset(pool, POOL_WANTED)), 0), stop)
                return [b.emit(f"xor i1 {_stopped(b, job).text}, true", "i1")]

            (go_on,) = b.branch(gives_way, look, lambda: [Value("true", "i1")])
            return go_on

        def launch(i: Value, _: list[Value]) -> None:
            entry = b.offset(program, b.mul(i, ENTRY_BYTES))

            def of(name: int, type_: str = "i64") -> Value:
                return b.load(type_, b.offset(entry, name), 8)

            function, args, tasks = of(ENTRY_FUNCTION, "ptr"), of(ENTRY_ARGS, "ptr"), of(ENTRY_TASKS)
            taken = b.offset(b.offset(counters, b.mul(i, counter_stride)), LINE)
            finished = b.offset(counters, b.mul(of(ENTRY_GROUP), counter_stride))

            def share(turn: Value, done: list[Value]) -> list[Value]:
                owner = b.rem(b.add(me, turn), threads)
                first = b.div(b.mul(tasks, owner), threads)
                size = b.i64(b.sub(b.div(b.mul(tasks, b.add(owner, 1)), threads), first))
                counter = b.offset(taken, b.mul(owner, LINE))

                def take(now: list[Value]) -> tuple[Value, list[Value]]:
                    def claim() -> list[Value]:
                        task = b.atomic_add(counter, 1)

                        def run() -> list[Value]:
                            b.call_pointer(function, "void", args, b.i64(b.add(first, task)), scratch)
                            return [b.i64(b.add(now[0], 1)), Value("true", "i1")]

                        return b.branch(b.compare("slt", task, size), run, lambda: [now[0], Value("false", "i1")])

                    # Looking first keeps the line shared where there is nothing to take.
                    left = b.compare("slt", b.atomic_load(counter), size)
                    (going,) = b.branch(left, lambda: [may_take()], lambda: [Value("false", "i1")])
                    after, more = b.branch(going, claim, lambda: [now[0], Value("false", "i1")])
                    return more, [after]

                return b.repeat(take, done)

            (mine,) = b.loop(0, threads, 1, share, [b.i64(0)])
            total = of(ENTRY_GROUP_TASKS)

            def account() -> None:
                now = b.i64(_now(b, clock))
                complete = b.compare("eq", b.add(b.atomic_add(finished, mine), mine), total)

                def completed() -> None:
                    b.store(now, b.offset(finished, STAMP), 8)
                    b.branch(b.compare("ne", threads, 1), lambda: _wake(b, pool))  # else nobody waits for this job

                b.branch(complete, completed)

            b.branch(b.compare("ne", mine, 0), account)
            last = b.compare("ne", of(ENTRY_GROUP_END), 0)
            b.branch(last, lambda: _discard(b.call_local("wait_or_stop", "void", pool, finished, total, job)))

        b.loop(0, count, 1, launch)

    module.function("execute", [("pool", "ptr"), ("job", "ptr"), ("me", "i64")], build, local=True)


def _stopped(b: Builder, job: Value) -> Value:
    """Whether the job gives way."""
    return b.compare("ne", b.atomic_load(b.offset(job, JOB_STOPPED)), 0)


def _account(b: Builder, job: Value, start: Value, clock: Value) -> None:
    """Add what the run took to the statistics of each step: from the end of the group before to the end of its own.

    Whoever finishes a group stamps it: the caller itself may be late, having lost its core while others worked. Runs
    after all threads have left the program, so that the stamps are there. Of a job that gave way, the group that it was
    at gets the time until now; the steps count as run when the last one is done.
    """
    stopped = _stopped(b, job)
    now = b.i64(_now(b, clock))
    program, counters, statistics = (
        b.load("ptr", b.offset(job, f), 8) for f in (JOB_PROGRAM, JOB_COUNTERS, JOB_STATISTICS)
    )
    stride = b.mul(b.add(b.load("i64", b.offset(job, JOB_THREADS), 8), 1), LINE)

    def launch(i: Value, carried: list[Value]) -> list[Value]:
        entry = b.offset(program, b.mul(i, ENTRY_BYTES))

        def of(name: int) -> Value:
            return b.load("i64", b.offset(entry, name), 8)

        def group() -> list[Value]:
            finished = b.offset(counters, b.mul(of(ENTRY_GROUP), stride))
            complete = b.compare("eq", b.load("i64", finished, 8), of(ENTRY_GROUP_TASKS))
            stamp = b.select(complete, b.load("i64", b.offset(finished, STAMP), 8), now)
            end = b.i64(b.smax(stamp, carried[0]))  # no stamp, 0, where there was no task
            row = b.offset(statistics, b.mul(of(ENTRY_STEP), 16))
            spent = b.offset(row, 8)
            runs = b.select(stopped, b.i64(0), of(ENTRY_STEP_END))
            b.store(b.i64(b.add(b.load("i64", row, 8), runs)), row, 8)
            b.store(b.i64(b.add(b.load("i64", spent, 8), b.sub(end, carried[0]))), spent, 8)
            return [end]

        return b.branch(b.compare("ne", of(ENTRY_GROUP_END), 0), group, lambda: [carried[0]])

    b.loop(0, b.load("i64", b.offset(job, JOB_COUNT), 8), 1, launch, [start])
