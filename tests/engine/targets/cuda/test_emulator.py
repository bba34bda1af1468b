"""The emulator must show what it is there to show: a kernel that is wrong does not pass."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from engine.plan.tensor import Buffer, BufferKind
from engine.targets.cuda.kernel import Kernel, Launch, Pointer
from engine.targets.cuda.source import Source
from tests.engine.targets.cuda.emulator import emulator

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no g++ for x86-64 here")
THREADS = 64


def run(body: str, threads: int = THREADS, blocks: int = 1, last_first: bool = False) -> np.ndarray:
    """`p.out` after a kernel of `body`; `shared` is its dynamic shared memory, `p.in` 0, 1, 2, …"""
    text = (
        '#include "types.cuh"\n#include "ptx/memory.cuh"\n#include "ptx/barrier.cuh"\n'
        "struct Params { float* out; float* in; };\n"
        'extern "C" __global__ void kernel(const __grid_constant__ Params p) {\n'
        "  extern __shared__ __align__(1024) u8 shared[];\n"
        f"  float* tile = reinterpret_cast<float*>(shared);\n{body}\n}}\n"
    )
    buffers = {name: Buffer(name, BufferKind.INPUT, 4 * THREADS) for name in ("out", "in")}
    memory = {"out": np.full(THREADS, np.nan, np.float32), "in": np.arange(THREADS, dtype=np.float32)}
    arguments = tuple((name, Pointer(buffer, ctype="float")) for name, buffer in buffers.items())
    launch = Launch(Kernel("test", Source("test", text), threads), (blocks, 1, 1), arguments)
    address: Callable[[Pointer], int] = lambda pointer: memory[pointer.buffer.name].ctypes.data  # noqa: E731
    emulator.run(launch, address, 0, 800, last_first=last_first)
    return memory["out"]


SWAP = "tile[threadIdx.x] = p.in[threadIdx.x]; {} p.out[threadIdx.x] = tile[63 - threadIdx.x];"


def test_threads_see_each_other_s_shared_memory_after_a_barrier() -> None:
    assert np.array_equal(run(SWAP.format("__syncthreads();")), np.arange(THREADS)[::-1])


def test_without_the_barrier_they_do_not() -> None:
    assert np.isnan(run(SWAP.format(""))).any()


def test_a_missing_barrier_shows_in_one_of_both_orders() -> None:
    body = "tile[threadIdx.x] = p.in[threadIdx.x]; {} p.out[threadIdx.x] = tile[threadIdx.x / 2];"
    for barrier, rights in (("", {True, False}), ("__syncthreads();", {True})):
        got = [run(body.format(barrier), last_first=last_first) for last_first in (False, True)]
        assert {bool(np.array_equal(one, np.arange(THREADS) // 2)) for one in got} == rights


@pytest.mark.parametrize("last_first", [False, True])
def test_a_numbered_barrier_holds_those_who_meet_until_the_others_have_passed(last_first: bool) -> None:
    body = (
        "if (threadIdx.x < 32) { meet_at<64>(1); p.out[threadIdx.x] = tile[threadIdx.x]; }\n"
        "else { tile[threadIdx.x - 32] = p.in[threadIdx.x]; pass_by<64>(1); p.out[threadIdx.x] = 0.0f; }"
    )
    assert np.array_equal(run(body, last_first=last_first)[:32], np.arange(32, 64))


def test_shuffles_exchange_within_a_warp() -> None:
    got = run("p.out[threadIdx.x] = __shfl_xor_sync(~0u, p.in[threadIdx.x], 5);")
    assert np.array_equal(got, np.arange(THREADS) ^ 5)


@pytest.mark.parametrize(
    ("wait", "arrives"), [("copy_async_wait<0>();", True), ("copy_async_wait<1>();", False), ("", False)]
)
def test_an_asynchronous_copy_arrives_when_it_is_waited_for(wait: str, arrives: bool) -> None:
    got = run(
        "if (threadIdx.x < 16) copy_async_16(shared_address(tile + 4 * threadIdx.x), p.in + 4 * threadIdx.x, true);"
        f"copy_async_commit(); {wait} __syncthreads(); p.out[threadIdx.x] = tile[threadIdx.x];"
    )
    assert np.array_equal(got, np.arange(THREADS)) == arrives


def test_a_copy_that_is_not_valid_writes_zeros() -> None:
    got = run(
        "if (threadIdx.x < 16) copy_async_16(shared_address(tile + 4 * threadIdx.x), nullptr, false);"
        "copy_async_commit(); copy_async_wait<0>(); __syncthreads(); p.out[threadIdx.x] = tile[threadIdx.x];"
    )
    assert not got.any()


def test_a_barrier_that_nobody_completes_is_reported() -> None:
    body = "if (threadIdx.x == 0) barrier_init(0, {}); __syncthreads(); barrier_arrive(0); barrier_wait(0, 0);"
    run(body.format(THREADS))
    with pytest.raises(emulator.EmulationError, match="64 threads wait for ever"):
        run(body.format(THREADS + 1))


def test_a_misaligned_copy_is_reported() -> None:
    with pytest.raises(emulator.EmulationError, match=r"block \(1, 0, 0\): cp.async from a misaligned address"):
        run("if (blockIdx.x) copy_async_16(0, p.in + 1, true);", blocks=2)


def test_a_kernel_that_is_no_cplusplus_is_reported() -> None:
    with pytest.raises(emulator.EmulationError, match="does not compile"):
        run("nonsense")
