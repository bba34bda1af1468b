"""PyTorch's side of the benchmarks, on the CPU: it computes what our steps say, on the operands that ours reads."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("cupy")
pytest.importorskip("cuda.bindings.nvrtc")

import torch

from benchmarks.cases import KernelCase
from benchmarks.cases.attention import AttentionCase, DecodeCase, Mask, VarlenCase, WindowCase
from benchmarks.cases.block import BlockCase
from benchmarks.cases.conv import ConvCase, Tail
from benchmarks.cases.gemm import Epilogue, Fp8Case, GemmCase, MatricesCase
from benchmarks.cases.light import Kind, LightCase
from benchmarks.gpu import operands as operands_module
from benchmarks.gpu.kernels import fills_of
from benchmarks.gpu.operands import Operands
from benchmarks.gpu.peers import eager, peers, reference
from benchmarks.gpu.steps import step_of
from engine.ir.dtype import DType
from engine.ir.graph import Node, Value
from tests.engine import ir_interpreter

ONLY_ON_A_GPU = {
    "cuDNN", "cuDNN fused", "flash", "flash, apart", "memory-efficient", "varlen_attn", "jagged", "jagged, apart"
}  # fmt: skip
SMALL: tuple[KernelCase, ...] = (
    *(GemmCase(33, 24, 48, epilogue) for epilogue in Epilogue),
    Fp8Case(48, 32, 64),
    Fp8Case(48, 32, 64, Epilogue.BIAS_GELU),
    MatricesCase(3, 33, 24, 48),
    ConvCase(2, 16, 24, 14, 3),
    ConvCase(2, 16, 24, 14, 1, 2),
    ConvCase(2, 16, 24, 14, 1, 2, tail=Tail.RESIDUAL_RELU),
    *(ConvCase(2, 16, 24, 14, 1, tail=tail) for tail in Tail),
    ConvCase(2, 48, 6, 1, 1, tail=Tail.SILU),
    ConvCase(1, 3, 32, 28, 7, 2),
    ConvCase(2, 3, 32, 28, 3, 2, tail=Tail.RELU6, fp32_image=True),
    ConvCase(2, 24, 24, 14, 5, 2, 24, Tail.RELU6),
    BlockCase(2, 16, 48, 16, 14),
    BlockCase(2, 16, 48, 24, 14, 5, 2),
    *(AttentionCase(3, 2, 20, 16, mask) for mask in Mask),
    WindowCase(3, 2, 20, 16, 6),
    VarlenCase(3, 2, 128, 16),
    VarlenCase(3, 2, 128, 16, causal=True),
    DecodeCase(3, 4, 2, 5, 40, 16),
    DecodeCase(3, 4, 4, 1, 40, 16),
    LightCase(Kind.LAYER_NORM_RESIDUAL, (9, 64)),
    LightCase(Kind.RMS_NORM, (9, 64)),
    LightCase(Kind.SOFTMAX, (9, 50)),
    LightCase(Kind.BIAS_GELU, (9, 64)),
    LightCase(Kind.GLOBAL_MEAN, (2, 16, 7, 7)),
    LightCase(Kind.MAX_POOL, (2, 16, 14, 14)),
)


@pytest.fixture(autouse=True)
def few_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands_module, "ROTATE_BYTES", 1 << 14)
    monkeypatch.setattr(operands_module, "MOST_SETS", 1 << 30)


def made(case: KernelCase) -> Operands:
    return Operands(step_of(case), reference(case), fills=fills_of(case), device="cpu")


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.suite} {case.name}")
def test_the_reference_computes_the_step(case: KernelCase) -> None:
    operands = made(case)
    step = operands.step
    values = tuple(Value(f"i{i}", t.dtype, t.shape) for i, t in enumerate(step.inputs))
    node = Node(step.op, values, (Value("o", step.outputs[0].dtype, step.outputs[0].shape),))
    for i in {0, operands.count - 1}:
        arrays = [array_of(tensor) for tensor in operands.inputs[i]]
        (expected,) = ir_interpreter.run_node(node, arrays, {})
        assert operands.check(i, torch.from_numpy(expected)) < 1e-3  # the interpreter rounds its result to fp16


def array_of(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype is not torch.float8_e4m3fn:
        return np.ascontiguousarray(tensor.numpy())
    bits: np.ndarray = tensor.contiguous().view(torch.uint8).numpy()
    return bits.view(DType.F8E4M3.numpy)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.suite} {case.name}")
def test_peers_agree_with_the_reference(case: KernelCase) -> None:
    operands = made(case)
    for peer in peers(case):
        if peer.name in ONLY_ON_A_GPU:
            continue
        check = operands.check if peer.part is None else operands.check_against(peer.part)
        for i in {0, operands.count - 1}:
            assert check(i, peer.run(*peer.lay_out(*operands.inputs[i]))) < 1e-2, peer.name


def test_sets_are_different_and_results_are_poisoned() -> None:
    operands = made(GemmCase(33, 24, 48))
    assert operands.count > 1
    assert not torch.equal(operands.inputs[0][0], operands.inputs[1][0])
    assert torch.equal(operands.inputs[0][1], operands.inputs[1][1])
    assert operands.output(1).isnan().all()


def test_of_small_operands_there_are_no_more_sets_than_a_graph_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(LightCase(Kind.SOFTMAX, (1, 2))).count == 1 << 11
    monkeypatch.setattr(operands_module, "MOST_SETS", 100)
    assert made(LightCase(Kind.SOFTMAX, (1, 2))).count == 100


def test_a_wrong_result_is_seen() -> None:
    operands = made(GemmCase(33, 24, 48))
    right = operands.reference(0)
    assert operands.check(0, right) == 0
    assert operands.check(0, operands.reference(1)) > 0.1
    assert not operands.check(0, torch.full_like(right, float("nan"))) <= 1e-2
    assert operands.check(0, right.t()) == float("inf")


def test_every_case_has_one_peer_for_the_whole_expression() -> None:
    assert all(eager(case).part is None for case in SMALL)
