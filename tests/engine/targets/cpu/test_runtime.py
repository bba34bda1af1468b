from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from engine.background import background
from engine.plan.tensor import Buffer, BufferKind
from engine.targets.cpu.codegen.emit import Value
from engine.targets.cpu.codegen.isa import host_isa
from engine.targets.cpu.kernel import KernelBuilder, KernelSpec, Launch, Pointer, StatusWord, launch
from engine.targets.cpu.runtime import Program, address, available_cores, pool


@dataclass(frozen=True)
class CountSpec(KernelSpec):
    """Adds 1 to the word of the task, `turns` times, if the word before it in `after` says that it may."""

    family: ClassVar[str] = "count"

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("words", "turns", "status")

    def emit(self, kernel: KernelBuilder) -> None:
        word = kernel.at(kernel.pointer("words"), kernel.task, 8)
        kernel.store(kernel.task, kernel.scratch, 8)

        def turn(_: Value, carried: list[Value]) -> list[Value]:
            return [kernel.i64(kernel.add(carried[0], 1))]

        (total,) = kernel.loop(0, kernel.integer("turns"), 1, turn, [kernel.load("i64", word, 8)])
        kernel.store(total, word, 8)
        wrong = kernel.compare("sgt", kernel.integer("turns"), 1000)
        kernel.branch(wrong, lambda: kernel.store(kernel.i64(1), kernel.pointer("status"), 8))


@dataclass(frozen=True)
class SumSpec(KernelSpec):
    """out = number of words among `count` that are at least `least`: looks whether a step before is complete."""

    family: ClassVar[str] = "sum"

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("words", "count", "least", "out")

    def emit(self, kernel: KernelBuilder) -> None:
        words, least = kernel.pointer("words"), kernel.integer("least")

        def word(i: Value, carried: list[Value]) -> list[Value]:
            reached = kernel.compare("sge", kernel.load("i64", kernel.at(words, i, 8), 8), least)
            return [kernel.i64(kernel.add(carried[0], kernel.convert("zext", reached, "i64")))]

        (total,) = kernel.loop(0, kernel.integer("count"), 1, word, [kernel.i64(0)])
        kernel.store(total, kernel.at(kernel.pointer("out"), kernel.task, 8), 8)


def words(count: int) -> tuple[np.ndarray, Buffer]:
    data = np.zeros(count, np.int64)
    return data, Buffer("words", BufferKind.PLAN, data.nbytes, data)


def count_launch(buffer: Buffer, tasks: int, first: int = 0, turns: int = 1, concurrent: bool = False) -> Launch:
    arguments = {"words": Pointer(buffer, 8 * first), "turns": turns, "status": StatusWord()}
    return launch(CountSpec(host_isa()), arguments, tasks, 64, concurrent)


def program(steps: Sequence[Sequence[Launch]], threads: int) -> Program:
    made = Program(steps, threads)
    made.prepare()
    for slot, pointer in zip(made.pointer_slots, made.pointers, strict=True):
        assert pointer.buffer.data is not None
        made.slots[slot] = address(pointer.buffer.data) + pointer.offset
    return made


def run(made: Program, times: int = 1) -> None:
    workers = pool()
    for _ in range(times):
        workers.run(made)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("tasks", [0, 1, 2, 7, 100])
def test_every_task_runs_once(threads: int, tasks: int) -> None:
    data, buffer = words(128)
    run(program([[count_launch(buffer, tasks)] for _ in range(20)], threads), 50)
    assert (data[:tasks] == 1000).all()
    assert not data[tasks:].any()


@pytest.mark.parametrize("threads", [2, 4])
def test_a_step_sees_all_of_the_step_before(threads: int) -> None:
    data, buffer = words(64)
    seen, out = words(64)
    steps: list[list[Launch]] = []
    for i in range(30):
        arguments = {"words": Pointer(buffer), "count": 64, "least": i + 1, "out": Pointer(out)}
        steps += [[count_launch(buffer, 64)], [launch(SumSpec(host_isa()), arguments, 64)]]
    made = program(steps, threads)
    for _ in range(200):
        data[:] = 0
        seen[:] = 0
        run(made)
        assert (seen == 64).all()


def test_concurrent_launches_of_a_step_are_all_done_before_the_next() -> None:
    data, buffer = words(30)
    seen, out = words(1)
    check = launch(SumSpec(host_isa()), {"words": Pointer(buffer), "count": 30, "least": 1, "out": Pointer(out)}, 1)
    first = [count_launch(buffer, 10, 10 * i, concurrent=i > 0) for i in range(3)]
    made = program([first, [check]], 3)
    for _ in range(200):
        data[:] = 0
        run(made)
        assert seen[0] == 30


def test_statistics_count_runs_and_time_of_each_step() -> None:
    _, buffer = words(8)
    made = program([[count_launch(buffer, 4, turns=10)], [count_launch(buffer, 4, turns=10_000_000)]], 2)
    start = time.perf_counter_ns()
    run(made, 3)
    elapsed = time.perf_counter_ns() - start
    runs, spent = made.statistics.reshape(-1, 2).T
    assert runs.tolist() == [3, 3]
    assert 0 < spent[0] < spent[1] <= elapsed


def test_a_status_word_belongs_to_its_step() -> None:
    _, buffer = words(8)
    made = program([[count_launch(buffer, 4)], [count_launch(buffer, 4, turns=2000)], [count_launch(buffer, 4)]], 2)
    run(made)
    assert made.status.tolist() == [0, 1, 0]


def test_a_program_runs_beside_itself_in_the_parts_of_the_pool() -> None:
    """With statistics, status words and arguments of its own each, on as many threads as it is given."""
    tasks = 16
    data, buffer = words(tasks)
    more, other_buffer = words(tasks)
    made = program([[count_launch(buffer, tasks, turns=500)], [count_launch(buffer, tasks, turns=500)]], 4)
    beside = made.on(2)
    assert (made.threads, beside.threads, made.on(8).threads) == (4, 2, 4)
    for slot in beside.pointer_slots:
        beside.slots[slot] = address(more)
    with pool().part() as first, pool().part() as second:
        assert {first.number, second.number} == {0, 1}
        jobs = [(first.pool, made), (second.pool, beside)]
        threads = [threading.Thread(target=lambda p=p, j=j: [p.run(j) for _ in range(50)]) for p, j in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (data == 50_000).all()
    assert (more == 50_000).all()
    for one_of_them in (made, beside):
        assert one_of_them.statistics.reshape(-1, 2)[:, 0].tolist() == [50, 50]
    wrong = program([[count_launch(other_buffer, 4)], [count_launch(other_buffer, 4, turns=2000)]], 2)
    again = wrong.on(1)
    run(again)
    assert (again.status.tolist(), wrong.status.tolist()) == ([0, 1], [0, 0])


def test_a_program_in_the_background_gives_way_to_one_in_a_part() -> None:
    tasks = 20_000
    data, buffer = words(tasks)
    long = program([[count_launch(buffer, tasks, turns=200_000)]], 2)
    thread = in_the_background(long)
    while not data.any():
        time.sleep(0.0005)

    def done_in(seconds: float) -> int:
        before = np.count_nonzero(data)
        time.sleep(seconds)
        return int(np.count_nonzero(data) - before)

    alone = done_in(0.15)
    with pool().part():
        done_in(0.02)  # what was under way
        beside = done_in(0.15)
        assert thread.is_alive(), "too little work to tell"
    assert beside <= 0.5 * alone, "more than the slices that it has now and then"
    thread.join(60)
    assert (data == 200_000).all()


def test_a_program_in_the_background_has_its_slices_while_parts_are_always_in_use() -> None:
    data, buffer = words(64)
    long = program([[count_launch(buffer, 64, turns=1_000_000)]], 2)
    ended = threading.Event()

    def use(delay: float) -> None:
        time.sleep(delay)
        while not ended.is_set():
            with pool().part():
                time.sleep(0.02)

    users = [threading.Thread(target=use, args=(delay,)) for delay in (0.0, 0.01)]
    for user in users:
        user.start()
    try:
        time.sleep(0.03)
        thread = in_the_background(long)
        thread.join(30)
        assert not thread.is_alive(), f"{data.astype(bool).sum()} of 64 tasks in half a minute"
    finally:
        ended.set()
        for user in users:
            user.join()
    assert (data == 1_000_000).all()


def test_runs_from_many_python_threads() -> None:
    data = [words(16) for _ in range(8)]
    programs = [program([[count_launch(buffer, 16)]] * 5, 2) for _, buffer in data]
    threads = [threading.Thread(target=run, args=(made, 300)) for made in programs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((array == 1500).all() for array, _ in data)


def in_the_background(made: Program) -> threading.Thread:
    """A thread that runs a program in the background; it has begun."""

    def body() -> None:
        with background():
            run(made)

    thread = threading.Thread(target=body)
    thread.start()
    return thread


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_program_in_the_background_lets_others_on_between_two_tasks(threads: int) -> None:
    """And does each of its tasks once all the same, every step after the step before."""
    tasks = 64
    data, buffer = words(tasks)
    seen, out = words(tasks)
    steps: list[list[Launch]] = []
    for i in range(6):
        arguments = {"words": Pointer(buffer), "count": tasks, "least": 1_000_000 * (i + 1), "out": Pointer(out)}
        steps += [[count_launch(buffer, tasks, turns=1_000_000)], [launch(SumSpec(host_isa()), arguments, tasks)]]
    long = program(steps, threads)
    other, other_buffer = words(4)
    short = program([[count_launch(other_buffer, 4)]], threads)
    thread = in_the_background(long)
    while not data.any():
        time.sleep(0.0005)
    between = 0
    while thread.is_alive():
        run(short)
        between += 1
        assert between > 1 or not (data == 6_000_000).all(), "the program came back only after the other's end"
    assert between >= 10
    assert (other == between).all()
    assert (data == 6_000_000).all()
    assert (seen == tasks).all()


def test_a_program_that_gave_way_counts_as_one_run_and_without_the_time_of_others() -> None:
    _, buffer = words(64)
    made = program([[count_launch(buffer, 64, turns=300_000)] for _ in range(4)], 2)
    _, other = words(2)
    long = program([[count_launch(other, 2, turns=20_000_000)]], 2)
    start = time.perf_counter_ns()
    thread = in_the_background(made)
    while thread.is_alive():
        run(long)
    elapsed = time.perf_counter_ns() - start
    runs, spent = made.statistics.reshape(-1, 2).T
    assert runs.tolist() == [1, 1, 1, 1]
    assert (spent > 0).all()
    assert long.statistics[1] > 0
    assert spent.sum() + long.statistics[1] <= elapsed, "the same time is counted twice"


def test_programs_in_the_background_take_turns_to_their_ends() -> None:
    data = [words(32) for _ in range(3)]
    threads = [in_the_background(program([[count_launch(buffer, 32, turns=10_000)]] * 50, 2)) for _, buffer in data]
    _, other = words(2)
    short = program([[count_launch(other, 2)]], 2)
    while any(thread.is_alive() for thread in threads):
        run(short)
    assert all((array == 500_000).all() for array, _ in data)


def test_idle_workers_use_no_processor_time() -> None:
    _, buffer = words(8)
    run(program([[count_launch(buffer, 8)]], 4))
    time.sleep(0.01)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.01


def test_python_goes_on_while_a_program_runs() -> None:
    _, buffer = words(8)
    made = program([[count_launch(buffer, 1, turns=100_000_000)]], 1)
    thread = threading.Thread(target=run, args=(made,))
    thread.start()
    turns = 0
    while thread.is_alive():
        turns += 1
    assert turns > 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_a_pool_of_its_own() -> None:
    data, buffer = words(8)
    made = program([[count_launch(buffer, 8)]], 3)
    run(made)
    child = os.fork()
    if child == 0:
        run(made)
        os._exit(0 if (data == 2).all() else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    run(made)
    assert (data == 2).all()


def test_available_cores_is_at_least_one() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
