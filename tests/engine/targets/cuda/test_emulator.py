"""The emulator must show what it is there to show: a kernel that is wrong does not pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from engine.plan.tensor import Buffer, BufferKind
from engine.targets.cuda.kernel import Kernel, Launch, PixelMap, Pointer, TensorMap
from engine.targets.cuda.source import Source
from tests.engine.targets.cuda.emulator import emulator

pytestmark = pytest.mark.skipif(emulator.compiler() is None, reason="no g++ for x86-64 here")
THREADS = 64


def run(
    body: str,
    threads: int = THREADS,
    blocks: int = 1,
    last_first: bool = False,
    shared_bytes: int = 1024,
    cluster: int = 1,
    late: int = 0,
) -> np.ndarray:
    """`p.out` after a kernel of `body`; `shared` is its dynamic shared memory, `p.in` 0, 1, 2, …"""
    text = (
        '#include "types.cuh"\n#include "ptx/memory.cuh"\n#include "ptx/barrier.cuh"\n#include "ptx/matrix_store.cuh"\n'
        '#include "ptx/cluster.cuh"\n'
        "struct Params { float* out; float* in; };\n"
        'extern "C" __global__ void kernel(const __grid_constant__ Params p) {\n'
        "  extern __shared__ __align__(1024) u8 shared[];\n"
        f"  float* tile = reinterpret_cast<float*>(shared);\n{body}\n}}\n"
    )
    buffers = {name: Buffer(name, BufferKind.INPUT, 4 * THREADS) for name in ("out", "in")}
    memory = {"out": np.full(THREADS, np.nan, np.float32), "in": np.arange(THREADS, dtype=np.float32)}
    arguments = tuple((name, Pointer(buffer, ctype="float")) for name, buffer in buffers.items())
    kernel = Kernel("test", Source("test", text), threads, shared_bytes, cluster=cluster)
    launch = Launch(kernel, (blocks, 1, 1), arguments)
    address: Callable[[Pointer], int] = lambda pointer: memory[pointer.buffer.name].ctypes.data  # noqa: E731
    emulator.run(launch, address, 0, 800, last_first=last_first, late=late)
    return memory["out"]


SWAP = "tile[threadIdx.x] = p.in[threadIdx.x]; {} p.out[threadIdx.x] = tile[63 - threadIdx.x];"


def test_threads_see_each_other_s_shared_memory_after_a_barrier() -> None:
    assert np.array_equal(run(SWAP.format("__syncthreads();")), np.arange(THREADS)[::-1])


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize(
    ("body", "race"),
    [
        (SWAP.format(""), "wrote|read"),
        ("tile[threadIdx.x] = p.in[threadIdx.x]; p.out[threadIdx.x] = tile[threadIdx.x / 2];", "wrote|read"),
        (SWAP.format("__shfl_sync(~0u, 0, 0);"), "wrote|read"),  # a shuffle orders no memory
        (SWAP.format("__syncwarp();"), "wrote|read"),  # nor do two warps wait for each other
        ("p.out[threadIdx.x] = tile[63 - threadIdx.x]; tile[threadIdx.x] = 1;", "read"),
        ("tile[threadIdx.x / 2] = threadIdx.x;", "something else"),
        ("reinterpret_cast<u8*>(tile)[threadIdx.x / 2] = threadIdx.x;", "something else"),
        ("__shared__ float own[64]; own[threadIdx.x] = 1; p.out[threadIdx.x] = own[63 - threadIdx.x];", "static"),
        (
            "auto swap = [](auto x) { __shared__ float own[64]; own[threadIdx.x] = x; return own[63 - threadIdx.x]; };"
            "p.out[threadIdx.x] = swap(1.0f);",
            "static",
        ),  # of a template
        ("tile[0] = 1; atomicAdd(tile, 1.0f);", "something else"),
    ],
)
def test_accesses_in_no_order_are_a_race(body: str, race: str, last_first: bool) -> None:
    with pytest.raises(emulator.EmulationError, match=f"race: .*{race}"):
        run(body, last_first=last_first)


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        "tile[threadIdx.x] = 1; __syncwarp(); p.out[threadIdx.x] = tile[threadIdx.x ^ 31];",
        "tile[threadIdx.x % 2] = 1;",  # all write the same
        "reinterpret_cast<u8*>(tile)[threadIdx.x] = 1; __syncthreads(); tile[threadIdx.x] = 1;",
        "tile[threadIdx.x] = 0; __syncthreads(); atomicAdd(tile, 1.0f); atomicAdd(tile, 1.0f);",
        SWAP.format("__syncthreads();") + "__syncthreads(); tile[threadIdx.x] = 2;",
    ],
)
def test_accesses_in_order_are_none(body: str, last_first: bool) -> None:
    run(body, last_first=last_first)


HANDED_ON = (
    "if (threadIdx.x == 0) barrier_init(512, 32); __syncthreads();"
    "if (threadIdx.x < 32) {{ tile[threadIdx.x] = 1; {} barrier_arrive(512); {} }}"
    "else {{ {} p.out[threadIdx.x] = tile[threadIdx.x - 32]; }}"
)


@pytest.mark.parametrize("last_first", [False, True])
def test_an_mbarrier_hands_on_what_was_before_the_arrival(last_first: bool) -> None:
    run(HANDED_ON.format("", "", "barrier_wait(512, 0);"), last_first=last_first)
    for late, unseen in (("tile[threadIdx.x] = 2;", "barrier_wait(512, 0);"), ("", "")):
        with pytest.raises(emulator.EmulationError, match="race"):
            run(HANDED_ON.format("", late, unseen), last_first=last_first)


def test_access_beyond_the_shared_memory_asked_for_is_reported() -> None:
    with pytest.raises(emulator.EmulationError, match="beyond the shared memory"):
        run("tile[threadIdx.x + 1] = 0;", shared_bytes=4 * THREADS)


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


COPY = (
    "if (threadIdx.x < 16) copy_async_16(shared_address(tile + 4 * threadIdx.x), p.in + 4 * threadIdx.x, true);"
    "copy_async_commit(); {} p.out[threadIdx.x] = tile[threadIdx.x];"
)


def test_an_asynchronous_copy_arrives_when_it_is_waited_for() -> None:
    assert np.array_equal(run(COPY.format("copy_async_wait<0>(); __syncthreads();")), np.arange(THREADS))


@pytest.mark.parametrize(
    "wait", ["__syncthreads();", "copy_async_wait<1>(); __syncthreads();", "copy_async_wait<0>();"]
)
def test_a_copy_that_is_not_waited_for_is_a_race(wait: str) -> None:
    with pytest.raises(emulator.EmulationError, match="race"):
        run(COPY.format(wait))


def test_a_copy_that_is_not_valid_writes_zeros() -> None:
    got = run(
        "if (threadIdx.x < 16) copy_async_16(shared_address(tile + 4 * threadIdx.x), nullptr, false);"
        "copy_async_commit(); copy_async_wait<0>(); __syncthreads(); p.out[threadIdx.x] = tile[threadIdx.x];"
    )
    assert not got.any()


SENT = (
    "for (u32 i = threadIdx.x; i < 1024; i += 64) reinterpret_cast<u16*>(shared)[i] = i;"
    "{} __syncwarp(); if (threadIdx.x % 32 == 0) barrier_arrive(2048);"
    "if (threadIdx.x == 0) {{ barrier_wait(2048, 0); store_box(p.map, 0, 32, 10); store_box_commit(); {} }}"
)
"""A box of 16 rows of 64 halves, whose columns end before those of the tensor do, and whose rows behind."""


def sent(fence: str, after: str) -> np.ndarray:
    """What comes of a tensor of 20 × 128 zeros."""
    text = (
        '#include "types.cuh"\n#include "ptx/memory.cuh"\n#include "ptx/barrier.cuh"\n#include "ptx/tma_store.cuh"\n'
        "struct Params { TensorMap map; };\n"
        'extern "C" __global__ void kernel(const __grid_constant__ Params p) {\n'
        "  extern __shared__ __align__(1024) u8 shared[];\n"
        "  if (threadIdx.x == 0) barrier_init(2048, 2);\n  __syncthreads();\n"
        f"{SENT.format(fence, after)}\n}}\n"
    )
    result = np.zeros((20, 128), np.uint16)
    map_ = TensorMap(Pointer(Buffer("out", BufferKind.OUTPUT, result.nbytes)), 20, 128, 128, 16, 64)
    launch = Launch(Kernel("test", Source("test", text), THREADS, 2056), (1, 1, 1), (("map", map_),))
    emulator.run(launch, lambda _: result.ctypes.data, 0, 900)
    return result


def test_a_box_is_stored_without_its_swizzle_as_far_as_the_tensor_reaches() -> None:
    got = sent("shared_writes_fence();", "store_box_wait();")
    linear = np.arange(1024).reshape(16, 8, 8)
    want = np.stack([row[np.arange(8) ^ (i % 8)].reshape(64) for i, row in enumerate(linear)])
    assert np.array_equal(got[10:, 32:96], want[:10])
    got[10:, 32:96] = 0
    assert not got.any()


@pytest.mark.parametrize(
    ("fence", "after", "what"),
    [
        ("", "store_box_wait();", "without a fence"),
        ("shared_writes_fence();", "", "ends before its boxes"),
        ("shared_writes_fence();", "shared[5] = 77; store_box_wait();", "race: .*is reading"),
        ("shared_writes_fence();", "store_box_wait_read<1>(); shared[5] = 77; store_box_wait();", "race: .*is reading"),
    ],
)
def test_a_box_that_is_not_whole_yet_or_changed_too_early_is_reported(fence: str, after: str, what: str) -> None:
    with pytest.raises(emulator.EmulationError, match=what):
        sent(fence, after)


def test_matrices_are_stored_as_they_are_loaded() -> None:
    got = run(
        "for (int i = threadIdx.x; i < 256; i += 64) tile[i] = p.in[i % 64]; __syncthreads();"
        "if (threadIdx.x < 32) { u32 r[4]; load_matrix_x4(r, 16 * threadIdx.x);"
        "store_matrix_x4(512 + 16 * threadIdx.x, r); }"
        "__syncthreads(); p.out[threadIdx.x] = tile[128 + threadIdx.x];"
    )
    assert np.array_equal(got, np.arange(64))


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


def walked(map_: PixelMap, image: np.ndarray, call: str) -> np.ndarray:
    """What a copy of pixels brings, [pixel, channel], with the swizzle undone."""
    text = (
        '#include "types.cuh"\n#include "ptx/memory.cuh"\n#include "ptx/barrier.cuh"\n#include "ptx/tma_im2col.cuh"\n'
        "struct Params { TensorMap map; half* out; };\n"
        'extern "C" __global__ void kernel(const __grid_constant__ Params p) {\n'
        "  extern __shared__ __align__(1024) u8 shared[];\n"
        f"  constexpr u32 BARRIER = 65536, ROW = {2 * map_.box_channels}, PIXELS = {map_.box_pixels};\n"
        "  barrier_init(BARRIER, 1);\n  barrier_arrive_expect(BARRIER, ROW * PIXELS);\n"
        f"  copy_pixels(0, p.map, BARRIER, {call});\n  barrier_wait(BARRIER, 0);\n"
        "  for (u32 i = 0; i < PIXELS * ROW; i += 2)\n"
        "    p.out[i / 2] = *reinterpret_cast<half*>(shared + (i ^ (i >> 7 & (ROW / 16 - 1)) << 4));\n}\n"
    )
    out = Buffer("out", BufferKind.OUTPUT, 0)
    result = np.zeros((map_.box_pixels, map_.box_channels), np.float16)
    memory = {out: result, map_.pointer.buffer: image}
    launch = Launch(
        Kernel("test", Source("test", text), 1, 228 << 10), (1, 1, 1), (("map", map_), ("out", Pointer(out)))
    )
    emulator.run(launch, lambda pointer: memory[pointer.buffer].ctypes.data, 0, 900)
    return result


def pixel_map(image: np.ndarray, **changes: object) -> PixelMap:
    """A map of an image [n, h, w, c] for 3 × 2 patches padded by 1 at the start, with steps of 2 along x."""
    n, h, w, c = image.shape
    plain = PixelMap(
        Pointer(Buffer("image", BufferKind.INPUT, image.nbytes)), c, n, h * w * c, (w, h), (c, w * c), (-1, -1),
        (-1, -2), (2, 1), 16, 40,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_a_walk_goes_through_its_bounding_box() -> None:
    image = np.random.default_rng(0).standard_normal((2, 4, 5, 24)).astype(np.float16)
    got = walked(pixel_map(image), image, "16, 1, -1, 0, 1, 2")
    padded = np.pad(image, ((0, 1), (2, 4), (2, 6), (0, 8)))  # an image, channels and pixels that are not there
    places = [(n, y, x) for n in range(3) for y in range(-1, 2) for x in (-1, 1, 3)]
    first = places.index((0, -1, 1))
    for pixel, (n, y, x) in zip(got, places[first : first + 26], strict=False):
        want = padded[min(n, 2), y + 2 + 2, x + 1 + 2, 16:32] if n < 2 else np.zeros(16)
        assert np.array_equal(pixel, want), (n, y, x)
    assert got.any() and not got[-20:].any()


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"lower": (-129, -1)}, "corners"),
        ({"upper": (-1, -7)}, "not empty"),
        ({"steps": (9, 1)}, "element strides"),
        ({"strides": (20, 120)}, "multiples of 16"),
        ({"box_channels": 24}, "a swizzle's"),
        ({"box_pixels": 1025}, "1024 pixels"),
    ],
)
def test_a_map_that_the_driver_refuses_is_reported(changes: dict[str, object], rule: str) -> None:
    image = np.zeros((2, 4, 5, 24), np.float16)
    with pytest.raises(emulator.EmulationError, match=rule):
        emulator.encode(pixel_map(image, **changes), 256)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("0, 0, -1, 0, 0, 0", "between its steps"),
        ("0, -3, -1, 0, 0, 0", "outside its bounding box"),
        ("0, -1, -1, 0, 256, 0", "more bits"),
        ("0, -1, -1, 0, 0, 0, 0, 0", "other axes"),
    ],
)
def test_a_walk_that_is_not_the_map_s_is_reported(call: str, what: str) -> None:
    image = np.zeros((2, 4, 5, 24), np.float16)
    with pytest.raises(emulator.EmulationError, match=what):
        walked(pixel_map(image), image, call)


# Clusters

PAIR = 128  # threads: blocks of clusters are whole warpgroups


def paired(body: str, last_first: bool = False, late: int = 0) -> np.ndarray:
    """After a kernel of `body` by a cluster of two blocks, each of a warpgroup, with a barrier at 512."""
    return run(body, PAIR, 2, last_first, 1024, cluster=2, late=late)


ARRIVED = (
    "if (threadIdx.x == 0) {{ barrier_init(shared_address(shared) + 512, 128); barrier_init_fence(); }} {start}"
    "const u32 own = shared_address(shared) + 512, other = address_in_cluster(own, cluster_rank() ^ 1);"
    "{arrive} {wait} if (threadIdx.x < 32) p.out[32 * blockIdx.x + threadIdx.x] = cluster_rank();"
)
START, ARRIVE, WAIT = "meet_cluster();", "barrier_arrive_in_cluster(other);", "barrier_wait(own, 0);"


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("last_first", [False, True])
def test_blocks_of_a_cluster_arrive_at_each_other_s_barriers(last_first: bool, late: int) -> None:
    got = paired(ARRIVED.format(start=START, arrive=ARRIVE, wait=WAIT), last_first, late)
    assert np.array_equal(got, np.repeat([0, 1], 32))


@pytest.mark.parametrize(
    ("start", "arrive", "wait", "what"),
    [
        ("__syncthreads();", ARRIVE, WAIT, "race|never initialised|more arrivals"),
        (START, ARRIVE, "", "may end before|has ended"),
        (START, "barrier_arrive(other);", WAIT, "a barrier of another block"),
        (START, "barrier_arrive_in_cluster(address_in_cluster(own, 2));", WAIT, "no such block"),
        (START, "if (cluster_rank()) barrier_arrive_in_cluster(other);", WAIT, "wait for ever"),
        (START, "store_shared_4(other, 0);", "", "misaligned or wild"),
    ],
)
def test_wrong_ways_into_another_block_are_reported(start: str, arrive: str, wait: str, what: str) -> None:
    with pytest.raises(emulator.EmulationError, match=what):
        paired(ARRIVED.format(start=start, arrive=arrive, wait=wait))


def shared_box(blocks: str, expected: int, before: str = "") -> np.ndarray:
    """What two blocks have of 16 rows of 64 halves, of which the block of each half copies it to `blocks`."""
    text = (
        '#include "types.cuh"\n#include "ptx/memory.cuh"\n#include "ptx/barrier.cuh"\n#include "ptx/cluster.cuh"\n'
        "struct Params { TensorMap map; half* out; };\n"
        'extern "C" __global__ void kernel(const __grid_constant__ Params p) {\n'
        "  extern __shared__ __align__(1024) u8 shared[];\n"
        "  const u32 box = shared_address(shared), barrier = box + 2048, rank = cluster_rank();\n"
        "  if (threadIdx.x == 0) { barrier_init(barrier, 1); barrier_init_fence(); }\n  meet_cluster();\n"
        f"  if (threadIdx.x == 0) {{ barrier_arrive_expect(barrier, {expected});\n"
        f"  copy_box_to_blocks(box + 1024 * rank, p.map, barrier, 0, 8 * rank, {blocks}); }}\n"
        f"  {before} barrier_wait(barrier, 0);\n"
        "  for (u32 i = threadIdx.x; i < 1024; i += 128)\n"
        "    p.out[1024 * rank + i] = reinterpret_cast<half*>(shared)[i ^ (i >> 6 & 7) << 3];\n  meet_cluster();\n}\n"
    )
    source, result = np.arange(1024, dtype=np.uint16), np.zeros(2048, np.uint16)
    pointers = [Pointer(Buffer(name, BufferKind.INPUT, 0)) for name in ("source", "result")]
    memory = {pointer.buffer: array for pointer, array in zip(pointers, (source, result), strict=True)}
    arguments = (("map", TensorMap(pointers[0], 16, 64, 64, 8, 64)), ("out", pointers[1]))
    launch = Launch(Kernel("test", Source("test", text), PAIR, 2056, cluster=2), (2, 1, 1), arguments)
    emulator.run(launch, lambda pointer: memory[pointer.buffer].ctypes.data, 0, 900)
    return result


def test_a_copy_to_both_blocks_arrives_in_both() -> None:
    assert np.array_equal(shared_box("3", 2048), np.tile(np.arange(1024), 2))


@pytest.mark.parametrize(
    ("blocks", "expected", "before", "what"),
    [
        ("1 << rank", 2048, "", "wait for ever"),
        ("3", 1024, "", "race|more|wait for ever"),
        ("7", 2048, "", "the cluster has not"),
        ("3", 2048, "shared[threadIdx.x] = 1;", "race"),
    ],
)
def test_a_copy_to_both_blocks_that_goes_wrong_is_reported(blocks: str, expected: int, before: str, what: str) -> None:
    with pytest.raises(emulator.EmulationError, match=what):
        shared_box(blocks, expected, before)


@pytest.mark.parametrize(
    ("threads", "blocks", "body", "what"),
    [
        (PAIR, 3, "", "whole clusters"),
        (64, 2, "", "whole warpgroups"),
        (PAIR, 2, "__shared__ float own[64]; own[threadIdx.x % 2] = 1; p.out[0] = own[1];", "static shared"),
    ],
)
def test_a_cluster_that_is_not_emulated_is_refused(threads: int, blocks: int, body: str, what: str) -> None:
    with pytest.raises(emulator.EmulationError, match=what):
        run(body, threads, blocks, cluster=2)


@pytest.mark.parametrize("late", [0, 1, 2, 3])
def test_latecomers_change_nothing_that_is_in_order(late: int) -> None:
    assert np.array_equal(run(SWAP.format("__syncthreads();"), late=late), np.arange(THREADS)[::-1])
    with pytest.raises(emulator.EmulationError, match="64 threads wait for ever"):
        run(
            "if (threadIdx.x == 0) barrier_init(0, 65); __syncthreads(); barrier_arrive(0); barrier_wait(0, 0);",
            late=late,
        )


def test_latecomers_show_a_turn_that_is_two_phases_late() -> None:
    """A warp completes two phases before another looks for the first."""
    body = (
        "if (threadIdx.x == 0) barrier_init(512, 1); __syncthreads();"
        "if (threadIdx.x < 32) barrier_wait(512, 0); else { if (threadIdx.x == 32) barrier_arrive(512);"
        "__syncwarp(); if (threadIdx.x == 32) barrier_arrive(512); }"
    )
    run(body)

    def run_late() -> None:
        for late in range(1, 20):
            run(body, late=late)

    with pytest.raises(emulator.EmulationError, match="wait for ever"):
        run_late()
