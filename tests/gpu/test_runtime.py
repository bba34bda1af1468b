"""The runtime on a real GPU: overlapped runs, wild indices, growth, full memory, bad caches, closing amid runs.

tests/engine/targets/cuda/test_runtime.py says the same of a fake GPU, with every interleaving made on purpose.
"""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest

import engine
from tests.gpu.conftest import Both, image_feeds, token_feeds

if TYPE_CHECKING:
    from engine.targets.cuda.target import CudaTarget

pytestmark = pytest.mark.gpu

RUNS = 10_000
MIB = 1 << 20
Feeds = dict[str, np.ndarray]
Work = tuple[engine.Model, Feeds]


def target_of(model: engine.Model) -> CudaTarget:
    return cast("CudaTarget", model._target)


def load(folder: Path) -> engine.Model:
    return engine.load(folder / "1" / "model.onnx", device="cuda", precision="fp16", packed=False)


def same(got: Feeds, expected: Feeds) -> bool:
    return all(np.array_equal(got[name], array) for name, array in expected.items())


def warm(work: Sequence[Work]) -> None:
    """Run everything on every slot, and again, because memory has moved meanwhile."""
    for model, feeds in (*work, *work):
        slots = target_of(model).slots
        for slot in slots.all:
            held = [slots.acquire(other.index) for other in slots.all if other is not slot]
            model.run(feeds)
            for other in held:
                slots.release(other)


# Overlap


def test_runs_from_eight_threads_give_the_same_bits_as_one_after_the_other(efficientnet: Both, minilm: Both) -> None:
    work: list[Work] = [(efficientnet.gpu, image_feeds(batch, batch)) for batch in (1, 2, 7, 16)]
    work += [(minilm.gpu, token_feeds(*size)) for size in ((1, 16), (7, 33), (16, 128), (3, 200), (32, 64))]
    expected = [model.run(feeds) for model, feeds in work]

    def run(i: int) -> bool:
        model, feeds = work[i % len(work)]
        return same(model.run(feeds), expected[i % len(work)])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(40 * len(work))))


def test_both_slots_are_used_and_the_figures_count_all_runs(minilm: Both) -> None:
    model, feeds = minilm.gpu, token_feeds(8, 128)
    assert model.concurrent_runs == 2
    warm([(model, feeds)])
    before = sum(stat.launches for stat in model.kernel_stats())
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: model.run(feeds), range(200)))
    steps = len(model.plan({"batch": 8, "sequence": 128}).steps)
    assert sum(stat.launches for stat in model.kernel_stats()) - before == 200 * steps
    assert all(slot.nbytes > 0 for slot in target_of(model).slots.all)


@pytest.mark.slow
def test_ten_thousand_runs_of_two_threads_allocate_nothing_on_the_device(efficientnet: Both, minilm: Both) -> None:
    import cupy

    work: list[Work] = [
        (minilm.gpu, token_feeds(1, 16)),
        (minilm.gpu, token_feeds(7, 33)),
        (efficientnet.gpu, image_feeds(1)),
    ]
    expected = [model.run(feeds) for model, feeds in work]
    warm(work)
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes(), pool.total_bytes(), cupy.cuda.runtime.memGetInfo()[0]

    def runs(thread: int) -> bool:
        right = True
        for i in range(RUNS // 2):
            model, feeds = work[(i + thread) % len(work)]
            right &= same(model.run(feeds), expected[(i + thread) % len(work)])
        return right

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(runs, range(2)))
    assert (pool.used_bytes(), pool.total_bytes(), cupy.cuda.runtime.memGetInfo()[0]) == before


# Wild indices


def wild(feeds: Feeds, index: int) -> Feeds:
    ids = feeds["input_ids"].copy()
    ids[-1, -1] = index
    return {**feeds, "input_ids": ids}


@pytest.mark.parametrize("index", [30522, 2**31, 2**40, -30523, -(2**62)])
def test_a_wild_id_names_the_input_and_the_next_run_is_right(minilm: Both, index: int) -> None:
    feeds = token_feeds(3, 20)
    expected = minilm.gpu.run(feeds)
    with pytest.raises(engine.ShapeError, match=rf"'input_ids' holds {index} at \[2, 19\].* 30522 rows"):
        minilm.gpu.run(wild(feeds, index))
    assert same(minilm.gpu.run(feeds), expected)


def test_ids_from_the_end_of_the_table_are_not_wild(minilm: Both) -> None:
    feeds = token_feeds(2, 9)
    last = minilm.gpu.run(wild(feeds, 30521))
    assert same(minilm.gpu.run(wild(feeds, -1)), last)
    minilm.gpu.run(wild(feeds, -30522))


def test_a_wild_id_fails_its_own_run_only(minilm: Both) -> None:
    feeds = token_feeds(4, 40)
    expected = minilm.gpu.run(feeds)

    def run(i: int) -> bool:
        if i % 3:
            return same(minilm.gpu.run(feeds), expected)
        with pytest.raises(engine.ShapeError, match="'input_ids' holds 99999"):
            minilm.gpu.run(wild(feeds, 99999))
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(300)))


def test_a_bound_model_reports_a_wild_id_at_the_next_launch_that_waits(minilm: Both) -> None:
    import cupy

    feeds = token_feeds(2, 20)
    bound = minilm.gpu.bind({"batch": 2, "sequence": 20})
    stream = cupy.cuda.Stream(non_blocking=True)

    def launch(given: Feeds, on: object) -> None:
        for name, array in given.items():
            bound.inputs[name].set(array)
        bound.launch(on)
        stream.synchronize()

    launch(wild(feeds, 99999), stream)
    launch(feeds, stream)
    with pytest.raises(engine.ShapeError, match="index is out of range for the table"):
        bound.launch()
    bound.launch()
    assert np.array_equal(bound.outputs["last_hidden_state"].get(), minilm.gpu.run(feeds)["last_hidden_state"])
    with pytest.raises(engine.ShapeError, match="index is out of range for the table"):
        launch(wild(feeds, 99999), None)
    bound.close()


# Growth and memory


def test_memory_grows_while_runs_are_under_way(all_minilm_l6_v2: Path, minilm: Both) -> None:
    small = token_feeds(2, 16)
    sizes = [(4, 32), (8, 64), (16, 128), (32, 200), (48, 256)]
    expected = {size: minilm.gpu.run(token_feeds(*size)) for size in sizes}
    expected_small = minilm.gpu.run(small)
    with load(all_minilm_l6_v2) as model:
        model.run(small)
        generation = target_of(model).arena_generation
        stop = threading.Event()

        def keep_running() -> int:
            count = 0
            while not stop.is_set():
                assert same(model.run(small), expected_small)
                count += 1
            return count

        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(keep_running) for _ in range(3)]
            try:
                for size in sizes:
                    assert same(model.run(token_feeds(*size)), expected[size])
            finally:
                stop.set()
            assert all(future.result() > 0 for future in running)
        assert target_of(model).arena_generation >= generation + len(sizes)


@contextmanager
def little_memory(leave: int) -> Iterator[None]:
    """At most `leave` bytes (and 2 MiB) of the GPU are free."""
    import cupy

    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    taken = []
    try:
        for size in (1024 * MIB, 64 * MIB, 2 * MIB):
            while cupy.cuda.runtime.memGetInfo()[0] - size >= leave:
                try:
                    taken.append(cupy.cuda.Memory(size))
                except (cupy.cuda.memory.OutOfMemoryError, cupy.cuda.runtime.CUDARuntimeError):
                    break
        yield
    finally:
        taken.clear()


def test_out_of_memory_at_growth_leaves_the_model_serving(efficientnet_lite0: Path, efficientnet: Both) -> None:
    one, many = image_feeds(1), image_feeds(128)
    expected = efficientnet.gpu.run(one)
    with load(efficientnet_lite0) as model:
        warm([(model, one)])
        before = model.memory()["arena"]
        with little_memory(leave=128 * MIB):
            for _ in range(2):
                with pytest.raises(engine.OutOfMemory):  # 77 MB for the images, 385 for the intermediates
                    model.run(many)
                assert same(model.run(one), expected)
                with pytest.raises(engine.OutOfMemory):
                    model.bind({"batch": 128})
            with ThreadPoolExecutor(4) as pool:
                assert all(pool.map(lambda _: same(model.run(one), expected), range(100)))
        assert model.memory()["arena"] >= before
        assert model.run(many)["logits"].shape == (128, 1000)
        assert same(model.run(one), expected)


def test_out_of_memory_for_the_weights_is_an_error_and_no_more(all_minilm_l6_v2: Path, minilm: Both) -> None:
    feeds = token_feeds(2, 16)
    expected = minilm.gpu.run(feeds)
    with little_memory(leave=24 * MIB), pytest.raises(engine.OutOfMemory), load(all_minilm_l6_v2) as model:
        model.run(feeds)  # the weights are 45 MB
    gc.collect()
    assert same(minilm.gpu.run(feeds), expected)
    with load(all_minilm_l6_v2) as model:
        assert same(model.run(feeds), expected)


# The cache of compiled kernels


def test_a_cache_folder_that_cannot_be_written_is_survived(
    all_minilm_l6_v2: Path, minilm: Both, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    feeds = token_feeds(2, 16)
    monkeypatch.setenv("TILEWAVE_CACHE_DIR", "/proc/tilewave")  # where root cannot make a folder either
    with load(all_minilm_l6_v2) as model:
        assert same(model.run(feeds), minilm.gpu.run(feeds))
    assert caplog.text.count("compiled kernels are not kept") == 1


def test_corrupt_cubins_are_compiled_anew(
    all_minilm_l6_v2: Path,
    minilm: Both,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from engine.targets.cuda.compiler import Compiler, DiskCache, Source

    feeds = token_feeds(2, 16)
    expected = minilm.gpu.run(feeds)
    monkeypatch.setenv("TILEWAVE_CACHE_DIR", str(tmp_path))
    with load(all_minilm_l6_v2) as model:
        model.run(feeds)
    folder = tmp_path / "kernels"
    files = sorted(folder.glob("*.cubin"))
    assert len(files) >= 5
    whole = {file: file.read_bytes() for file in files}
    cache = DiskCache(folder)
    # Two kinds with the right checksum: no machine code, and that of an architecture that this GPU cannot run.
    other = Compiler("sm_80" if target_of(minilm.gpu).device.architecture.name != "sm_80" else "sm_90a").cubin(
        Source("other", 'extern "C" __global__ void kernel() {}\n')
    )
    damages = itertools.cycle(
        (
            lambda file: file.write_bytes(b""),
            lambda file: file.write_bytes(whole[file][:-100]),
            lambda file: cache.write(file.stem, b"no machine code"),
            lambda file: cache.write(file.stem, other),
        )
    )
    for file, damage in zip(files, damages, strict=False):
        damage(file)
    with caplog.at_level("WARNING"), load(all_minilm_l6_v2) as model:
        assert same(model.run(feeds), expected)
    assert "the driver refuses the cached one" in caplog.text
    assert {file: file.read_bytes() for file in files} == whole, "the next start would compile them again"


# Closing


def test_closing_waits_for_the_runs_under_way(all_minilm_l6_v2: Path, minilm: Both) -> None:
    import cupy

    feeds = token_feeds(16, 128)
    expected = minilm.gpu.run(feeds)
    gc.collect()
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    model = load(all_minilm_l6_v2)
    model.run(feeds)
    started = threading.Barrier(5)

    def until_closed() -> int:
        started.wait()
        for count in itertools.count():
            try:
                got = model.run(feeds)
            except engine.EngineError as error:
                return count if "closed" in str(error) else -1
            if not same(got, expected):
                return -1
        raise AssertionError("unreachable")

    with ThreadPoolExecutor(4) as threads:
        running = [threads.submit(until_closed) for _ in range(4)]
        started.wait()
        time.sleep(0.2)
        model.close()
        counts = [future.result() for future in running]
    assert min(counts) >= 0 and sum(counts) > 0
    gc.collect()
    assert pool.used_bytes() == before


# Figures, printed


def test_host_time_of_a_launch_and_gain_of_two_threads(efficientnet: Both, minilm: Both) -> None:
    cases = (
        ("EfficientNet-Lite0", efficientnet.gpu, {"batch": 1}, image_feeds(1)),
        ("EfficientNet-Lite0", efficientnet.gpu, {"batch": 32}, image_feeds(32)),
        ("MiniLM", minilm.gpu, {"batch": 1, "sequence": 16}, token_feeds(1, 16)),
        ("MiniLM", minilm.gpu, {"batch": 32, "sequence": 128}, token_feeds(32, 128)),
    )
    for name, model, sizes, feeds in cases:
        warm([(model, feeds)])
        target = target_of(model)
        executable = target.bind(model.plan(sizes))
        executable.prepare()
        executable.launch()
        target.device.stream.synchronize()
        rounds, launches, seconds = 25, 8, 0.0  # few at a time: a full queue would make the host wait for the device
        for _ in range(rounds):
            began = time.perf_counter()
            for _ in range(launches):
                executable.launch()
            seconds += time.perf_counter() - began
            target.device.stream.synchronize()
        launch_us = seconds / (rounds * launches) * 1e6
        executable.close()
        rates = []
        for threads in (1, 2):
            count = 200
            with ThreadPoolExecutor(threads) as pool:
                began = time.perf_counter()
                list(pool.map(lambda _, model=model, feeds=feeds: model.run(feeds), range(count)))
                rates.append(count / (time.perf_counter() - began))
        print(
            f"{name} {sizes}: {launch_us:.1f} µs of host time a launch; {rates[0]:.0f} runs/s from one thread, "
            f"{rates[1]:.0f} from two"
        )
        assert min(rates) > 0
