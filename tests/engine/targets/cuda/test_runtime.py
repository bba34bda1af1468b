"""The runtime of the CUDA target on a fake GPU (fake_cupy.py): overlap, growth, errors, closing in the midst of runs.
Needs the CUDA packages, no GPU."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("cupy")
pytest.importorskip("cuda.bindings.nvrtc")

import engine
from engine import frontend, passes
from engine.model import PLAN_CACHE_BYTES, Model
from engine.targets.cuda import program
from engine.targets.cuda.memory import SLOTS, Growing, Slots
from engine.targets.cuda.target import CudaTarget
from tests.engine.targets.cuda.fake_cupy import FREED, FakeArray, FakeGpu, bytes_at, fake_gpu

ROWS, FEATURES = 10, 8
WAIT_S = 20

Feeds = dict[str, np.ndarray]


def model_bytes() -> bytes:
    """A table looked up by `ids`, plus `x`, through two products."""
    body = "e = Gather(table, ids) s = Add(e, x) h = MatMul(s, w) r = Relu(h) y = MatMul(r, v)"
    graph = onnx.parser.parse_graph(f"g (int64[n,t] ids, float[n,t,{FEATURES}] x) => (float[n,t,4] y) {{ {body} }}")
    rng = np.random.default_rng(0)
    for name, shape in (("table", (ROWS, FEATURES)), ("w", (FEATURES, 64)), ("v", (64, 4))):
        array = rng.standard_normal(shape).astype(np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]).SerializeToString()


def feeds(n: int, t: int, seed: int = 0) -> Feeds:
    rng = np.random.default_rng((n, t, seed))
    ids = rng.integers(-ROWS, ROWS, (n, t))
    return {"ids": ids, "x": rng.standard_normal((n, t, FEATURES)).astype(np.float32)}


def wild(n: int, t: int) -> Feeds:
    found = feeds(n, t)
    found["ids"][0, t - 1] = ROWS
    return found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    with fake_gpu(monkeypatch) as made:
        yield made


def load(plan_cache_bytes: int = PLAN_CACHE_BYTES) -> Model:
    return Model(passes.run(frontend.read(model_bytes()), CudaTarget.traits), CudaTarget(), plan_cache_bytes)


@pytest.fixture
def model(gpu: FakeGpu) -> Iterator[Model]:
    loaded = load()
    yield loaded
    gpu.gate.set()
    loaded.close()


def target_of(model: Model) -> CudaTarget:
    target = model._target
    assert isinstance(target, CudaTarget)
    return target


def answer(model: Model, given: Feeds) -> np.ndarray:
    return model.run(given)["y"]


def wait_for(condition: Callable[[], bool]) -> None:
    ticking = threading.Event()
    for _ in range(int(WAIT_S / 0.002)):
        if condition():
            return
        ticking.wait(0.002)
    raise AssertionError("the condition never came true")


class Background:
    """Calls in threads of their own."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(8)

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self.pool.submit(work, *arguments)


@pytest.fixture
def background(gpu: FakeGpu) -> Iterator[Background]:
    made = Background()
    yield made
    gpu.gate.set()
    made.pool.shutdown()


def warm(model: Model, *sizes: tuple[int, int]) -> None:
    """A run of every size on every slot, and again, because memory has moved meanwhile."""
    target = target_of(model)
    for n, t in (*sizes, *sizes):
        for index in range(SLOTS):
            held = [target.slots.acquire(i) for i in range(SLOTS) if i != index]
            model.run(feeds(n, t))
            for slot in held:
                target.slots.release(slot)


# Results


def test_a_run_gives_what_the_cpu_gives(model: Model) -> None:
    given = feeds(3, 5)
    with engine.load(model_bytes(), device="cpu") as cpu:
        np.testing.assert_allclose(answer(model, given), answer(cpu, given), rtol=1e-2, atol=1e-2)


def test_runs_from_eight_threads_give_the_same_bits_as_one_after_the_other(model: Model, gpu: FakeGpu) -> None:
    work = [feeds(n, t, seed) for seed in range(6) for n, t in ((1, 1), (2, 7), (9, 3), (30, 11))]
    alone = [answer(model, given) for given in work]
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda given: answer(model, given), work))
        assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


def test_steps_are_counted_and_timed_over_all_slots(model: Model) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: model.run(feeds(2, 3, seed)), range(64)))
    stats = model.kernel_stats()
    steps = len(model.plan({"n": 2, "t": 3}).steps)
    assert sum(stat.launches for stat in stats) == 64 * steps
    assert all(stat.seconds > 0 for stat in stats)


# Overlap


def test_the_copies_of_a_run_are_made_while_another_computes(
    model: Model, gpu: FakeGpu, background: Background
) -> None:
    warm(model, (2, 3), (5, 4))
    first, second, third = feeds(2, 3), feeds(5, 4), feeds(2, 3, 1)
    expected = [answer(model, given) for given in (first, second, third)]
    gpu.gate.clear()
    gpu.log.clear()
    while gpu.computing.acquire(blocking=False):
        pass
    runs = [background(answer, model, first)]
    assert gpu.computing.acquire(timeout=WAIT_S)
    runs.append(background(answer, model, second))
    wait_for(lambda: [what for what, _ in gpu.log] == ["in", "begin", "in"])
    runs.append(background(answer, model, third))  # no slot is left: it waits
    assert not gpu.computing.acquire(timeout=0.1)
    assert [what for what, _ in gpu.log] == ["in", "begin", "in"]
    gpu.gate.set()
    assert all(np.array_equal(run.result(WAIT_S), want) for run, want in zip(runs, expected, strict=True))
    names = [what for what, _ in gpu.log]
    assert names.count("in") == names.count("out") == names.count("begin") == 3


def test_a_lone_caller_pays_for_one_slot(model: Model) -> None:
    for _ in range(3):
        model.run(feeds(4, 4))
    assert [slot.nbytes > 0 for slot in target_of(model).slots.all] == [True, False]


def test_a_run_on_warm_slots_allocates_and_captures_nothing(model: Model, gpu: FakeGpu) -> None:
    sizes = [(1, 4), (6, 6)]
    warm(model, *sizes)
    before = gpu.allocations, gpu.captures, gpu.used
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda i: model.run(feeds(*sizes[i % 2], i)), range(200)))
    assert (gpu.allocations, gpu.captures, gpu.used) == before


def test_a_thread_that_waits_for_its_result_does_not_hold_the_lock(
    model: Model, gpu: FakeGpu, background: Background
) -> None:
    warm(model, (2, 3))
    gpu.gate.clear()
    run = background(answer, model, feeds(2, 3))
    wait_for(lambda: "begin" in [what for what, _ in gpu.log[-2:]])
    assert background(model.kernel_stats).result(WAIT_S)
    assert background(model.memory).result(WAIT_S)
    assert background(model.plan, {"n": 1, "t": 1}).result(WAIT_S)
    assert not run.done()
    gpu.gate.set()
    run.result(WAIT_S)


# Wild indices


def test_a_wild_index_names_the_input_and_the_next_run_is_right(model: Model) -> None:
    expected = answer(model, feeds(2, 3))
    for _ in range(3):
        with pytest.raises(engine.ShapeError, match=r"'ids' holds 10 at \[0, 2\].* 10 rows"):
            model.run(wild(2, 3))
        assert np.array_equal(answer(model, feeds(2, 3)), expected)


def test_a_wild_index_fails_its_own_run_only(model: Model) -> None:
    expected = answer(model, feeds(2, 3))

    def run(i: int) -> bool:
        if i % 3:
            return np.array_equal(answer(model, feeds(2, 3)), expected)
        with pytest.raises(engine.ShapeError, match="'ids' holds 10"):
            model.run(wild(2, 3))
        return True

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, range(60)))


def test_the_message_of_the_executable_is_that_of_the_cpu(model: Model) -> None:
    plan = model.plan({"n": 1, "t": 2})
    given = wild(1, 2)
    outputs = {name: np.empty(t.shape, t.dtype.numpy) for name, t in plan.outputs.items()}
    step = next(step for step in plan.steps if getattr(step.op, "gathers", ()) or step.op.name == "Gather")
    with pytest.raises(engine.ShapeError) as told:
        target_of(model).bind(plan).run(given, outputs)
    assert str(told.value) == f"step {step.name!r}: an index is out of range for the table that it looks up"


def test_a_bound_model_reports_a_wild_index_once_at_the_next_launch_that_waits(model: Model, gpu: FakeGpu) -> None:
    bound = model.bind({"n": 2, "t": 3})
    assert all(isinstance(array, FakeArray) for array in (*bound.inputs.values(), *bound.outputs.values()))

    def fill(given: Feeds) -> None:
        for name, array in given.items():
            bound.inputs[name].set(array)

    fill(feeds(2, 3))
    bound.launch()
    expected = answer(model, feeds(2, 3))
    assert np.array_equal(bound.outputs["y"].get(), expected)
    stream = gpu.null
    fill(wild(2, 3))
    bound.launch(stream)
    stream.synchronize()
    fill(feeds(2, 3))
    bound.launch(stream)
    stream.synchronize()
    with pytest.raises(engine.ShapeError, match="index is out of range"):
        bound.launch()
    bound.launch()
    assert np.array_equal(bound.outputs["y"].get(), expected)
    bound.close()
    with pytest.raises(engine.EngineError, match="closed"):
        bound.launch()


# Growth and memory


def test_the_arena_moves_when_the_runs_in_it_are_over(model: Model, gpu: FakeGpu, background: Background) -> None:
    small, large = feeds(2, 3), feeds(40, 20)
    expected = answer(model, small)
    generation = target_of(model).arena_generation
    gpu.gate.clear()
    run = background(answer, model, small)
    wait_for(lambda: gpu.log[-1][0] == "begin")
    growing = background(answer, model, large)
    again = background(answer, model, small)
    threading.Event().wait(0.1)
    assert not growing.done() and not run.done()
    gpu.gate.set()
    assert np.array_equal(run.result(WAIT_S), expected)
    assert np.array_equal(again.result(WAIT_S), expected)
    assert np.array_equal(growing.result(WAIT_S), answer(model, large))
    assert target_of(model).arena_generation > generation


def test_growth_under_load_keeps_every_result_right(model: Model) -> None:
    sizes = [(n, t) for n in (1, 3, 9, 27) for t in (2, 5, 11)]
    expected = {}
    with load() as other:
        for n, t in sizes:
            expected[n, t] = answer(other, feeds(n, t))

    def run(size: tuple[int, int]) -> bool:
        return np.array_equal(answer(model, feeds(*size)), expected[size])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, [*sizes, *reversed(sizes), *sizes]))


@pytest.mark.parametrize("room", [0, 4096])
def test_out_of_memory_at_growth_leaves_the_model_serving(model: Model, gpu: FakeGpu, room: int) -> None:
    given = feeds(4, 4)
    expected = answer(model, given)
    before = model.memory()
    gpu.capacity = gpu.used + room
    for _ in range(2):
        with pytest.raises(engine.OutOfMemory):
            model.run(feeds(200, 100))
        with pytest.raises(engine.OutOfMemory):
            model.bind({"n": 200, "t": 100})
        gc.collect()
        assert model.memory() == before, "the old memory is not back"
        assert np.array_equal(answer(model, given), expected)
    gpu.capacity = 1 << 30
    assert answer(model, feeds(200, 100)).shape == (200, 100, 4)


def test_where_a_second_slot_has_no_memory_runs_take_turns(model: Model, gpu: FakeGpu) -> None:
    expected = answer(model, feeds(4, 4))
    gpu.capacity = gpu.used
    with ThreadPoolExecutor(6) as pool:
        assert all(np.array_equal(got, expected) for got in pool.map(lambda _: answer(model, feeds(4, 4)), range(24)))
    assert target_of(model).slots.all[1].nbytes == 0


def test_memory_that_did_not_fit_is_asked_for_again() -> None:
    made: list[int] = []
    room = [100]

    def allocate(nbytes: int) -> bytearray:
        made.append(nbytes)
        if nbytes > room[0]:
            raise MemoryError
        return bytearray(nbytes)

    piece = Growing(allocate, lambda: None)
    piece.reserve(60)
    room[0] = 80
    with pytest.raises(MemoryError):
        piece.reserve(90)
    assert (piece.nbytes, len(piece.memory), piece.generation) == (60, 60, 1)
    room[0] = 10
    with pytest.raises(MemoryError):
        piece.reserve(90)  # nor does the old size fit any more
    assert piece.nbytes == 0
    piece.reserve(5)
    assert (piece.nbytes, made) == (5, [60, 90, 60, 90, 60, 5])


# Errors


def test_a_launch_that_fails_gives_its_slot_back(model: Model, gpu: FakeGpu) -> None:
    expected = answer(model, feeds(2, 3))
    for code, error in ((1, engine.DeviceError), (2, engine.OutOfMemory)):
        for _ in range(2 * SLOTS):
            gpu.failures.append(code)
            with pytest.raises(error) as told:
                model.run(feeds(2, 3))
            assert not isinstance(told.value, engine.DeviceLost)
    assert np.array_equal(answer(model, feeds(2, 3)), expected)


def test_a_lost_device_is_said_to_every_run_and_can_be_closed(gpu: FakeGpu, background: Background) -> None:
    model = load()
    warm(model, (2, 3))
    gpu.gate.clear()
    runs = [background(answer, model, feeds(2, 3)) for _ in range(6)]
    wait_for(lambda: gpu.log[-1][0] in {"begin", "in"})
    gpu.lost = True
    gpu.gate.set()
    for run in runs:
        with pytest.raises(engine.DeviceLost, match="lost to this process"):
            run.result(WAIT_S)
    model.close()


def test_feeds_that_do_not_fit_cost_no_slot(model: Model) -> None:
    plan = model.plan({"n": 1, "t": 2})
    executable = target_of(model).bind(plan)
    outputs = {name: np.empty(t.shape, t.dtype.numpy) for name, t in plan.outputs.items()}
    for _ in range(2 * SLOTS):
        with pytest.raises(engine.ShapeError, match="expected a C-contiguous"):
            executable.run(feeds(1, 3), outputs)
    executable.run(feeds(1, 2), outputs)


# Closing


def test_closing_waits_for_the_runs_under_way_and_refuses_later_ones(gpu: FakeGpu, background: Background) -> None:
    model = load()
    expected = answer(model, feeds(2, 3))
    gpu.gate.clear()
    runs = [background(answer, model, feeds(2, 3)) for _ in range(2)]
    wait_for(lambda: model._calls == 2)
    closing = background(model.close)
    wait_for(lambda: model._closed)
    with pytest.raises(engine.EngineError, match="closed"):
        model.run(feeds(2, 3))
    assert not closing.done()
    gpu.gate.set()
    assert all(np.array_equal(run.result(WAIT_S), expected) for run in runs)
    closing.result(WAIT_S)
    gc.collect()
    assert gpu.used == 0, "memory is left behind"


def test_a_plan_that_is_dropped_while_it_runs_ends_after_the_run(gpu: FakeGpu, background: Background) -> None:
    with load(plan_cache_bytes=0) as model:
        expected = {t: answer(model, feeds(2, t)) for t in (3, 4)}
        launches = sum(stat.launches for stat in model.kernel_stats())
        steps = len(model.plan({"n": 2, "t": 3}).steps)
        gpu.gate.clear()
        runs = {t: background(answer, model, feeds(2, t)) for t in (3, 4)}
        wait_for(lambda: model._calls == 2 and model.plans_ready == 1 and len(model._ending) == 1)
        wait_for(lambda: sum(stat.launches for stat in model.kernel_stats()) == launches + 2 * steps)
        gpu.gate.set()
        assert all(np.array_equal(run.result(WAIT_S), expected[t]) for t, run in runs.items())
        assert not model._ending
        assert sum(stat.launches for stat in model.kernel_stats()) == launches + 2 * steps


def test_a_bound_model_closes_after_its_launch(model: Model, gpu: FakeGpu, background: Background) -> None:
    bound = model.bind({"n": 2, "t": 3})
    gpu.gate.clear()
    launch = background(bound.launch)
    wait_for(lambda: bool(gpu.log) and gpu.log[-1][0] == "begin")
    closing = background(bound.close)
    threading.Event().wait(0.05)
    assert not closing.done()
    gpu.gate.set()
    launch.result(WAIT_S)
    closing.result(WAIT_S)


def test_every_sixteenth_run_is_sampled_unless_none_is(model: Model) -> None:
    """Where time does not count."""
    target, given = target_of(model), feeds(2, 3)
    target.sample_seconds = 0.0

    def sampled(runs: int) -> int:
        executable = model._ready({"n": 2, "t": 3}).bound
        before = executable._program.samples
        for _ in range(runs):
            model.run(given)
        return int(executable._program.samples - before)

    model.run(given)
    assert sampled(32) == 2
    target.sample_every = 0
    assert sampled(32) == 0
    target.sample_every = 8
    assert sampled(32) == 4


def test_short_runs_are_sampled_by_the_clock(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    given, now = feeds(2, 3), [0.0]
    monkeypatch.setattr(program.time, "monotonic", lambda: now[0])
    executable = model._ready({"n": 2, "t": 3}).bound
    sampled: list[int] = []
    for run in range(200):
        before = executable._program.samples
        model.run(given)
        now[0] += 0.25e-3
        sampled += [run] * (executable._program.samples - before)
    assert sampled == [1, 17, 77, 137, 197], "15 ms are 60 runs, once it is known how fast they come"


def test_a_caller_far_ahead_does_not_write_over_stamps_on_their_way(model: Model, gpu: FakeGpu) -> None:
    target = target_of(model)
    target.sample_seconds = 0.0
    stream = gpu.namespace().cuda.Stream()
    bound = model.bind({"n": 2, "t": 3})
    executable = bound._held.bound
    gpu.gate.clear()
    for _ in range(100):
        bound.launch(stream)
    assert executable.samples == 0
    gpu.gate.set()
    stream.synchronize()
    stats = executable.step_stats()
    assert executable.samples == 1 and all(stat.seconds > 0 and stat.launches == 100 for stat in stats)
    bound.launch()
    executable.step_stats()
    assert executable.samples == 2, "and the next run stands for all that came meanwhile"
    bound.close()


def test_a_run_kernel_by_kernel_writes_stamps_where_it_is_told_to(model: Model) -> None:
    plan = model.plan({"n": 2, "t": 3})
    executable = target_of(model).bind(plan)
    outputs = {name: np.zeros(tensor.shape, tensor.dtype.numpy) for name, tensor in plan.outputs.items()}
    executable.run(feeds(2, 3), outputs)
    executable.empty_stamps()
    assert not executable.stamps_ns().any()
    executable.launch_each()
    assert not executable.stamps_ns().any()
    executable.launch_each(stamped=True)
    first = executable.stamps_ns()
    assert first.shape == (len(plan.steps),) and (first > 0).all()
    executable.launch_each(stamped=True)
    assert (executable.stamps_ns() > first).all(), "from the first start to the last end"
    executable.empty_stamps()
    assert not executable.stamps_ns().any()


def test_kernels_one_by_one_do_what_the_graph_does(model: Model, gpu: FakeGpu) -> None:
    given, target = feeds(2, 3), target_of(model)
    expected = answer(model, given)
    plan = model.plan({"n": 2, "t": 3})
    executable = target.bind(plan)
    outputs = {name: np.zeros(tensor.shape, tensor.dtype.numpy) for name, tensor in plan.outputs.items()}
    executable.run(given, outputs)
    captures, begun = gpu.captures, len(gpu.log)
    slot = target.slots.all[0]
    for tensor in plan.outputs.values():
        start = executable._layout.tensors[id(tensor.buffer)]
        bytes_at(slot.device + start, tensor.nbytes)[:] = 0
        executable.launch_each()
        target.device.stream.synchronize()
        found = bytes_at(slot.device + start, tensor.nbytes).view(tensor.dtype.numpy).reshape(tensor.shape)
        assert np.array_equal(found, expected)
    assert (gpu.captures, len(gpu.log)) == (captures, begun), "no graph ran"


# Slots


class Numbered:
    def __init__(self, index: int) -> None:
        self.index = index


def test_the_lowest_free_slot_is_taken_and_the_third_waits(background: Background) -> None:
    slots = Slots((Numbered(0), Numbered(1)))
    first, second = slots.acquire(), slots.acquire()
    assert (first.index, second.index) == (0, 1)
    waiting = background(slots.acquire)
    only_first = background(slots.acquire, 0)
    slots.release(second)
    assert waiting.result(WAIT_S) is second
    assert not only_first.done()
    slots.release(first)
    assert only_first.result(WAIT_S) is first
    closing = background(slots.close)
    refused = background(slots.acquire)
    with pytest.raises(engine.EngineError, match="closed"):
        refused.result(WAIT_S)
    assert not closing.done()
    slots.release(first)
    slots.release(second)
    closing.result(WAIT_S)


def test_freed_memory_is_not_read_again(gpu: FakeGpu) -> None:
    """What the other tests of this file rely on."""
    target = CudaTarget()
    target.reserve_arena(100)
    address = target.arena_address
    target.reserve_arena(10_000)
    assert target.arena_address != address
    assert (gpu.graveyard[-1] == FREED).all()
    target.close()
