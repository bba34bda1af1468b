"""What lowering chooses, and what it packs. Needs the CUDA packages, no GPU."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.nvrtc")

from engine.errors import DeviceError, UnsupportedOp
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Attention, Conv, Gemm, Pointwise
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda import covering as cv
from engine.targets.cuda.architecture import ARCHITECTURES, SM_80, SM_90A, for_capability
from engine.targets.cuda.covering import ACC, F16, F32, make_step, weight
from engine.targets.cuda.families import family_of
from engine.targets.cuda.gemm import launches_of, parts_of
from engine.targets.cuda.kernel import (
    I64,
    Ahead,
    Context,
    Instruction,
    Launch,
    LevelSizes,
    Pointer,
    TensorArgument,
    WeightStore,
    pack,
    params_struct,
    workspace_bytes,
)
from engine.targets.cuda.product import line_elements, pack_weight
from engine.targets.cuda.spaces import operand, space
from engine.targets.cuda.tiles import MMA_TILES, PRODUCT_TILES, WGMMA_TILES, WgmmaTile


def lower(step, architecture=SM_90A) -> Launch:
    (launch,) = family_of(step.op).lower(step, Context(architecture, 132, WeightStore()))
    return launch


def test_hopper_takes_wgmma_where_the_copy_engine_can_read() -> None:
    aligned = make_step(Gemm((cv.stored(ACC),)), [(F16, (640, 384)), weight(384, 384)])
    odd = make_step(Gemm((cv.stored(ACC),)), [(F16, (640, 383)), weight(383, 384)])
    computed = make_step(Gemm((cv.stored(ACC),)), [(F16, (640, 383)), (F16, (383, 384))])
    assert lower(aligned).kernel.instruction is Instruction.WGMMA
    assert lower(aligned, SM_80).kernel.instruction is Instruction.MMA
    assert lower(odd, SM_80).kernel.instruction is Instruction.MMA
    assert lower(computed).kernel.instruction is Instruction.MMA
    copy, product = family_of(odd.op).lower(odd, Context(SM_90A, 132, WeightStore()))
    assert product.kernel.instruction is Instruction.WGMMA
    assert dict(copy.arguments)["rows_out"].buffer is dict(product.arguments)["map_a"].pointer.buffer


def test_copied_rows_and_partial_sums_lie_side_by_side() -> None:
    """A step has one workspace."""
    step, context = make_step(Gemm((ACC,)), [(F16, (64, 8191)), weight(8191, 64)]), Context(SM_90A, 132, WeightStore())
    found = parts_of(step, context)
    assert found is not None
    launches = launches_of(*found, WgmmaTile(64, 64, 12, aligns=True, splits=8), context)
    copy, product = (dict(launch.arguments) for launch in launches)
    rows, partials, splits = copy["rows_out"], product["partials"], product["splits"]
    assert rows.buffer is partials.buffer is product["map_a"].pointer.buffer
    assert partials.offset >= 64 * 8192 * 2
    assert workspace_bytes(launches) >= partials.offset + 4 * 64 * 64 * splits


def test_lines_of_k_are_never_cut() -> None:
    """By the lines of the cache, which have 128 bytes."""
    for dtype in (F16, F32):
        for k in range(1, 700):
            nbytes, used = line_elements(k, dtype) * dtype.itemsize, k * dtype.itemsize
            assert nbytes % 16 == 0 and used <= nbytes < used + 128
            assert all(start % 128 + min(used, 128) <= 128 for start in range(0, nbytes * 8, nbytes))


def test_fp32_takes_wgmma_only_where_it_may_be_rounded() -> None:
    step = make_step(Gemm((ACC,)), [(F32, (2048, 384)), weight(384, 384, dtype=F32)])
    for tf32, instruction in ((True, Instruction.WGMMA), (False, Instruction.MMA)):
        *split, launch = family_of(step.op).lower(step, Context(SM_90A, 132, WeightStore(), tf32))
        assert launch.kernel.instruction is instruction
        assert len(split) == tf32, "its rows are brought into two parts before"


def test_few_tiles_of_a_long_product_share_its_k() -> None:
    """Through global memory, on Hopper in clusters."""
    step, architecture = make_step(Gemm((ACC,)), [(F16, (64, 8192)), weight(8192, 64)]), SM_80
    assert lower(step, SM_90A).kernel.cluster > 1 and workspace_bytes([lower(step, SM_90A)]) == 0
    launch = lower(step, architecture)
    arguments = dict(launch.arguments)
    assert launch.grid[1] == arguments["splits"] > 1
    assert not arguments["arrived"].buffer.data.any()
    assert workspace_bytes([launch]) == arguments["partials"].buffer.nbytes >= 4 * 64 * 64 * arguments["splits"]
    assert arguments["arrived"].buffer.data.size >= launch.grid[0]
    whole = lower(make_step(Gemm((ACC,)), [(F16, (4096, 256)), weight(256, 4096)]), architecture)
    assert "splits" not in dict(whole.arguments)
    assert workspace_bytes([whole]) == 0


def test_a_pointwise_convolution_is_a_product() -> None:
    step = make_step(cv.conv_op(1), [(F16, (2, 64, 9, 9)), weight(32, 64, 1, 1), weight(32, 1, 1)])
    assert lower(step).kernel.family == "gemm"


def test_every_tile_fits_some_architecture_and_the_smallest_has_one() -> None:
    least = min(architecture.shared_bytes for architecture in ARCHITECTURES.values())
    assert any(tile.shared_bytes <= least for tile in MMA_TILES)
    assert all(tile.shared_bytes <= SM_90A.shared_bytes for tile in (*WGMMA_TILES, *PRODUCT_TILES))


def test_one_kernel_serves_every_batch() -> None:
    def kernel(batch: int):
        inputs: list[cv.Given] = [(F16, (batch, 128, 384)), weight(384, 1536), weight(1536)]
        return lower(make_step(Gemm((cv.BIAS_GELU,)), inputs)).kernel

    assert kernel(32) == kernel(33)
    assert len({kernel(batch) for batch in range(1, 65)}) <= len(PRODUCT_TILES)


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        (Gemm((ACC,)), [(DType.STRING, (4, 8)), (DType.STRING, (8, 4))]),
        (Attention(1.0, stores=(ACC,)), [(F16, (1, 1, 4, 520))] * 3),
        (Attention(1.0, stores=(ACC,)), [(F16, (1, 1, 4, 8)), *[(F32, (1, 1, 4, 8))] * 2]),
        (Conv((1,) * 4, ((0, 0),) * 4, (1,) * 4), [(F16, (1, 8, 4, 4, 4, 4)), weight(8, 8, 3, 3, 3, 3)]),
        (Conv((1, 1), ((0, 0),) * 2, (1, 1)), [(DType.I8, (1, 8, 4, 4)), (DType.I8, (8, 8, 3, 3))]),
    ],
)  # fmt: skip
def test_what_has_no_kernel_is_refused(op, inputs) -> None:
    with pytest.raises(UnsupportedOp):
        make_step(op, inputs)


def test_weights_are_packed_once() -> None:
    store = WeightStore()
    (w,) = make_step(Gemm((ACC,)), [(F16, (1, 8)), weight(8, 8)]).inputs[1:]
    assert store.packed(w, "n,k lines", pack_weight) is store.packed(w, "n,k lines", pack_weight)
    assert store.packed(w, "n,k lines", pack_weight) is not store.packed(w, "k,n", lambda array: array)


def test_weight_layouts() -> None:
    b = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float16)
    assert np.array_equal(pack_weight(b)[:, :5], b.T)
    assert not pack_weight(b)[:, 5:].any()


def test_parameters_lie_as_a_c_compiler_lays_them() -> None:
    buffer = Buffer("b", BufferKind.INPUT, 64)
    arguments = (
        ("m", 7), ("t", TensorArgument(Pointer(buffer), (1, 2, 3), 4)), ("levels", LevelSizes((5, 6))), ("n", 9),
        ("stride", I64(-1)), ("scale", 0.5),
    )  # fmt: skip
    words = np.frombuffer(pack(arguments, lambda _: 1234, lambda _: b"", 99), np.int64)
    assert words[0] == 7
    assert words[1:7].tolist() == [1234, 1, 2, 3, 0, 4]
    assert words[7] == 5 | 6 << 32
    assert words[9] == 9  # padded before the stride, which is aligned to 8 bytes
    assert words[10] == -1
    assert np.float32(0.5) == words[11:12].view(np.float32)[0]
    assert words[12] == 99


def test_a_launch_that_tells_its_own_time_does_nothing_ahead() -> None:
    arguments = (("m", 7), ("early", Ahead(5)))
    for alone, steps in ((False, 5), (True, 0)):
        words = np.frombuffer(pack(arguments, lambda _: 0, lambda _: b"", 99, alone=alone), np.uint32)
        assert words.tolist() == [7, steps, 99, 0]
    assert params_struct(arguments) == params_struct((("m", 7), ("early", 5)))


def test_what_looks_up_tables_has_a_status_word_and_nothing_else_has() -> None:
    embedding = lower(cv.embedding_norm(2, 5, 64))
    assert embedding.looks_up
    assert "table_index<i64>" in embedding.kernel.source.text
    assert "u32* prologue_status;" in embedding.kernel.source.text
    context = Context(SM_90A, 132, WeightStore())
    steps = {step.name: family_of(step.op).lower(step, context) for step in cv.steps()}
    looking_up = {name for name, launches in steps.items() if any(launch.looks_up for launch in launches)}
    assert looking_up == {
        "embedding norm", "gather rows", "gather elements", "scatter rows", "scatter sum", "scatter maximum",
    }  # fmt: skip
    params = pack(embedding.arguments, lambda _: 1234, lambda _: b"", 99, 77)
    without = pack(embedding.arguments, lambda _: 1234, lambda _: b"", 99)
    changed = np.flatnonzero(np.frombuffer(params, np.int64) != np.frombuffer(without, np.int64))
    assert [int(np.frombuffer(words, np.int64)[changed[0]]) for words in (params, without)] == [77, 0]
    assert len(changed) == 1


def test_rows_that_lie_together_merge() -> None:
    buffer = Buffer("b", BufferKind.INPUT, 2 * 8 * 5 * 16)
    dense = operand(Tensor(buffer, F16, (8, 5, 16), (80, 16, 1)), 3)
    broadcast = operand(Tensor(buffer, F16, (5, 16), (16, 1)), 3)
    assert space((8, 5, 16), (0, 1), (2,), [dense]).levels == (40,)
    assert space((8, 5, 16), (0, 1), (2,), [dense, broadcast]).levels == (8, 5)
    assert space((8, 1, 16), (0, 1), (2,), [dense]).levels == (8,)


def test_a_layout_has_as_many_levels_as_it_needs() -> None:
    shape, strides = (2, 3, 2, 3, 2, 8), (1000, 1, 300, 20, 7, 31)
    tensor = Tensor(Buffer("b", BufferKind.INPUT, 1 << 20), F16, shape, strides)
    assert space(shape, range(5), (5,), [operand(tensor, 6)]).levels == shape[:5]
    launch = lower(make_step(Pointwise((ex.Arg(0, F16),)), [tensor]))
    assert "max_levels = 5;" in launch.kernel.source.text


def test_a_tensor_with_more_rows_than_a_kernel_counts_is_refused() -> None:
    shape = (1 << 31, 3)
    tensor = Tensor(Buffer("b", BufferKind.INPUT, 1 << 40), F16, shape, (5, 1))
    with pytest.raises(UnsupportedOp, match="2³¹"):
        lower(make_step(Pointwise((ex.Arg(0, F16),)), [tensor]))


def test_a_large_copy_counts_in_64_bits() -> None:
    tensor = Tensor(Buffer("b", BufferKind.INPUT, 1 << 40), F16, (1 << 10, 1 << 25), (1 << 25, 1))
    assert "count_t = u64;" in lower(make_step(Pointwise((ex.Arg(0, F16),)), [tensor])).kernel.source.text
    tensor = Tensor(Buffer("b", BufferKind.INPUT, 1 << 40), F16, (1 << 10, 1 << 20), (1 << 20, 1))
    assert "count_t = u32;" in lower(make_step(Pointwise((ex.Arg(0, F16),)), [tensor])).kernel.source.text


def test_old_gpus_are_refused_by_name() -> None:
    with pytest.raises(DeviceError, match=r"7\.5"):
        for_capability(7, 5)
    assert for_capability(9, 0).name == "sm_90a"


def test_a_copy_between_layouts_runs_along_the_result() -> None:
    launch = lower(cv.layout_copy(1, 32, 10, 10))
    arguments = dict(launch.arguments)
    assert (arguments["size_x"], arguments["size_y"]) == (32, 100)
    assert isinstance(make_step(Pointwise((ex.Arg(0, DType.I64),)), [(DType.I64, (3,))]).op, Pointwise)
