"""Launches of products on TMA and wgmma: of one product (gemm_wgmma.cuh), of one whose results are staged
(gemm_staged.cuh; where their rows begin anywhere gemm_ragged.cuh), of either by blocks in pairs (gemm_cluster.cuh,
gemm_cluster_staged.cuh), by clusters that share k (gemm_joined.cuh), of several matrices (gemm_batch.cuh). Called by
`gemm.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engine.ir.dtype import DType
from engine.plan.tensor import Buffer, BufferKind
from engine.targets.cuda.kernel import (
    I64,
    STORAGE,
    Ahead,
    Argument,
    Context,
    Functor,
    Instruction,
    Launch,
    Pointer,
    RowMatrix,
    TensorMap,
    ceildiv,
    launch,
    workspace,
)
from engine.targets.cuda.product import PART_STEPS, Product, columns_in_parts
from engine.targets.cuda.staging import STAGED_WIDTH
from engine.targets.cuda.tiles import WgmmaTile

_EARLY_STEPS, _FEWER_EARLY_STEPS = 5, 3
"""Steps of a constant b that blocks ask for while the kernel before ends, in grids on more than a half of the device,
and on more than three quarters. Of 35 products on an H100 in up to four tiles each, with 2, 3, 5 or all steps, small
grids were the fastest with all (15 % less than without), those of 96 blocks with 5, larger ones with 3: there columns
that are needed later hold up the first rows (512×3072×768 took 4 % longer with all, 7 % less with 3)."""


def split_arguments(
    tiles: int, elements: int, warps: int, splits: int, partials: Pointer | None = None
) -> dict[str, Argument]:
    """What kernels/scheduler/split_k.cuh asks of a kernel's arguments: partial sums of `tiles` of so many `elements`,
    where `partials` says or in a workspace, and a counter for each of the `warps` that share a tile."""
    if splits == 1:
        return {}
    partials = partials or Pointer(workspace(tiles * splits * elements * 4), ctype="float")
    arrived = Buffer("arrived", BufferKind.PLAN, tiles * warps * 4, np.zeros(tiles * warps, np.uint32))
    return {
        "partials": partials, "arrived": Pointer(arrived, ctype="u32"), "splits": splits,
    }  # fmt: skip


def scratch_bytes(product: Product, tile: WgmmaTile) -> int:
    """What blocks leave each other in a workspace: partial sums of a split product, or moments of rows (two of fp32
    for each row and column of tiles)."""
    if tile.splits > 1:
        return tile.tiles(product.m, product.n) * tile.splits * tile.m * tile.n * 4
    return ceildiv(product.n, tile.n) * product.m * 8 if product.found_in(tile) is not None else 0


def _factor_arguments(product: Product, tile: WgmmaTile, scratch: Pointer | None) -> dict[str, Argument]:
    """What the kernel takes for factors of rows of a and of the result (kernels/scheduler/row_moments.cuh)."""
    arguments: dict[str, Argument] = {} if product.divisors is None else {"row_factors": product.divisors}
    found = product.found_in(tile)
    if found is None:
        return arguments
    moments = scratch or Pointer(workspace(scratch_bytes(product, tile)))
    groups = ceildiv(product.m, tile.m * tile.cluster_m) * tile.m * tile.cluster_m // 16
    arrived = Buffer("arrived tiles", BufferKind.PLAN, groups * 4, np.zeros(groups, np.uint32))
    return arguments | {
        **found.arguments(),
        "moments": replace(moments, ctype="float2"), "arrived_tiles": Pointer(arrived, ctype="u32"),
    }  # fmt: skip


def launch_wgmma(
    product: Product,
    epilogue: Functor,
    tile: WgmmaTile,
    context: Context,
    scratch: Pointer | None,
) -> Launch:
    """The launch of one product, with results staged or not, by blocks in pairs or each on its own."""
    a, b, columns = product.a, product.b, 128 // product.dtype.itemsize
    tiles = tile.tiles(product.m, product.n)
    blocks = tiles * tile.cluster_k if tile.cluster_k > 1 else tile.blocks(tiles, context.multiprocessors)
    k = columns_in_parts(product.k) if product.in_parts else product.k  # as it lies
    found = product.found_in(tile)
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[product.dtype], "grouped": False, "in_parts": product.in_parts,
        "divided": product.divisors is not None, "moments": found is not None,
        "offsets": found is not None and found.offsets is not None,
        "band": tile.band(product.n * k * product.dtype.itemsize),
    }  # fmt: skip
    partials = replace(scratch, ctype="float") if scratch is not None else None
    body, maps = "gemm_cluster.cuh" if tile.cluster > 1 else "gemm_wgmma.cuh", dict[str, Argument]()
    if tile.cluster_k > 1:
        body = "gemm_joined.cuh"
    form = epilogue.staged if tile.slots else None
    if form is not None and form.ragged:
        body, config["width"], config["words"] = "gemm_ragged.cuh", STAGED_WIDTH, form.result.in_words
        config["dense"] = is_dense(form.result, product.n, tile)
        maps = {"result": form.result.pointer, "result_stride": I64(form.result.stride)}
        epilogue = Functor(form.code, form.arguments, epilogue.reads)
    elif form is not None:
        body = "gemm_cluster_staged.cuh" if tile.cluster > 1 else "gemm_staged.cuh"
        config["width"] = STAGED_WIDTH
        epilogue, maps = staged(epilogue, tile, product.m, product.n)
    return launch(
        "gemm",
        body,
        {**tile.config, **config},
        [epilogue],
        {
            **maps,
            **_factor_arguments(product, tile, scratch),
            "map_a": TensorMap(a.pointer, product.m, k, a.stride, tile.m // tile.cluster_n, columns),
            "map_b": TensorMap(b.pointer, product.n, k, b.stride, tile.n // tile.cluster_m, columns),
            "m": product.m,
            "n": product.n,
            "k": k // 2 * PART_STEPS if product.in_parts else k,
            "early": Ahead(early_steps(product, tile, blocks * tile.splits, context)),
            **split_arguments(tiles, tile.m * tile.n, tile.m // tile.consumer_rows * 4, tile.splits, partials),
        },
        (blocks, tile.splits, 1),
        tile.threads,
        tile.shared_bytes,
        _instruction(product.dtype),
        helpers=f'#include "ptx/wgmma.cuh"\n{wgmma_function(tile.n, product.dtype)}',
        cluster=tile.cluster * tile.cluster_k,
    )


def early_steps(product: Product, tile: WgmmaTile, blocks: int, context: Context) -> int:
    """The steps of b that a block asks for while the kernel before ends, of `blocks`: none of what that may compute."""
    if not product.b.is_constant:
        return 0
    if 2 * blocks <= context.multiprocessors:
        return tile.stages
    most = _EARLY_STEPS if 4 * blocks <= 3 * context.multiprocessors else _FEWER_EARLY_STEPS
    return min(tile.stages, most)


def is_dense(result: RowMatrix, n: int, tile: WgmmaTile) -> bool:
    """Whether 16 rows of the result, of one tile, are one piece of memory, and have room in a warp's shared memory
    (kernels/mma/ragged_stores.cuh). Beside 128 accumulators there are no registers for it (the gate shows spills)."""
    room = tile.slots * tile.consumer_rows * tile.staged_columns * 2 // 4
    return n <= tile.n and result.stride == n and 32 * n + 32 <= room and tile.accumulators < 128


def staged(epilogue: Functor, tile: WgmmaTile, m: int, n: int) -> tuple[Functor, dict[str, Argument]]:
    """The staged form of an epilogue, which it has, and the maps of the m × n results and of what it reads of them."""
    form, box = epilogue.staged, (m, n, tile.consumer_rows, tile.staged_columns)
    assert form is not None, "the caller has looked"
    maps: dict[str, Argument] = {"map_result": form.result.map(*box)}
    if form.tile is not None:
        maps["map_tile"] = form.tile.map(*box)
    return Functor(form.code, form.arguments, epilogue.reads), maps


def launch_batched(product: Product, epilogue: Functor, tile: WgmmaTile, tiles: int, context: Context) -> Launch:
    """The launch for products of several matrices, or across the lines of b."""
    a, b, batch = product.a, product.b, product.batch
    sizes = (1, 1, *batch.sizes)[-2:]
    a_along, b_along = ((0, 0, *strides)[-2:] for strides in (batch.a, batch.b))

    def places(strides: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Inner axis first. Along an axis where all matrices are one there is one place; its stride means nothing."""
        axes = zip(reversed(sizes), reversed(strides), strict=True)
        return tuple((size, stride) if stride else (1, 16 // product.dtype.itemsize) for size, stride in axes)

    across, columns = not b.k_inner, 128 // product.dtype.itemsize
    forms = (False, True) if product.dtype.itemsize == 2 else (False,)  # the kernel names both, if there are both
    multiply = "".join(wgmma_function(tile.n, product.dtype, form) for form in forms)
    map_a = TensorMap(a.pointer, product.m, product.k, a.stride, tile.m, columns, places(a_along))
    if across:
        map_b = TensorMap(b.pointer, product.k, product.n, b.stride, columns, columns, places(b_along))
    else:
        map_b = TensorMap(b.pointer, product.n, product.k, b.stride, tile.n, columns, places(b_along))
    return launch(
        "gemm",
        "gemm_batch.cuh",
        {
            **tile.config, "operand": STORAGE[product.dtype], "grouped": False, "across": across,
            "band": tile.band(product.n * product.k * product.dtype.itemsize),
        },
        [epilogue],
        {
            "map_a": map_a, "map_b": map_b,
            "m": product.m, "n": product.n, "k": product.k, "matrices": batch.count, "inner": sizes[1],
            "a_inner": int(a_along[1] != 0), "a_outer": int(a_along[0] != 0),
            "b_inner": int(b_along[1] != 0), "b_outer": int(b_along[0] != 0),
        },
        (min(tiles, context.multiprocessors), 1, 1),
        tile.threads,
        tile.shared_bytes,
        _instruction(product.dtype),
        helpers=f'#include "ptx/wgmma_panels.cuh"\n{multiply}',
    )  # fmt: skip


def _instruction(dtype: DType) -> Instruction:
    return {DType.F8E4M3: Instruction.WGMMA_FP8, DType.I8: Instruction.WGMMA_INT8}.get(dtype, Instruction.WGMMA)


_INSTRUCTIONS = {
    DType.F16: ("k16.f32.f16.f16", "1, 1, 0, 0"), DType.BF16: ("k16.f32.bf16.bf16", "1, 1, 0, 0"),
    DType.F8E4M3: ("k32.f32.e4m3.e4m3", "1, 1"), DType.I8: ("k32.s32.s8.s8", ""),
    DType.F32: ("k8.f32.tf32.tf32", "1, 1"),
}  # fmt: skip
"""The end of the instruction's name, and its factors of the operands (and, for 16 bits, whether k is not innermost).

Of e4m3 the unit aligns the 32 products of an instruction and the accumulator with the largest of them and keeps 13 bits
behind its leading one (the "14 bits" of public reports, as the 22-bit accumulator of fp8 units before it). Numbers of
either sign lose on average less than half of 2⁻¹³ of that, so that K / 32 instructions lose about 2⁻¹³ · √(K / 32) of
the sum, relative L2: 2.0e-3 at K = 8192, and fewer at once where a product is as large as the sum. That is a twentieth
of what rounding both operands to e4m3 leaves (3.7e-2), so partial sums are not promoted to fp32 registers, which would
take as many registers again and an addition each: 5e-4 at every 1024 of k, for tiles of half the size."""


def wgmma_function(n: int, dtype: DType, across: bool = False) -> str:
    """`wgmma<n, T>`: d (64 × n; fp32, of integers int32) = a · bᵀ, plus d itself where `accumulate` is not 0. Operands
    are descriptors of elements of `dtype`. `wgmma_across<n, T>` (16 bits): the rows of b are k."""
    count, storage, name = n // 2, STORAGE[dtype], "wgmma_across" if across else "wgmma"
    instruction, factors = _INSTRUCTIONS[dtype]
    last = ", ".join(["p", *filter(None, ["1, 1, 0, 1" if across else factors])])
    kind, constraint = ("float", "f") if dtype.is_float else ("i32", "r")
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+{constraint}"(d[{i}])' for i in range(count))
    return (
        f"template <int N, class T> DEVICE void {name}({kind} (&d)[N / 2], u64 a, u64 b, u32 accumulate);\n"
        f"template <> DEVICE void {name}<{n}, {storage}>({kind} (&d)[{count}], u64 a, u64 b, u32 accumulate) {{\n"
        f'  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"\n'
        f'               "wgmma.mma_async.sync.aligned.m64n{n}{instruction} {{{registers}}}, %{count}, %{count + 1}, '
        f'{last};\\n}}"\n'
        f'               : {operands} : "l"(a), "l"(b), "r"(accumulate));\n}}\n'
    )
