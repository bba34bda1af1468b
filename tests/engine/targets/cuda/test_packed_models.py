"""Encoders on packed tokens on sm_90a: every step of their plans has a kernel, and the kernels, one after the other,
give what the padded graph does at real tokens (conftest.py says on what they run)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import frontend, passes
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Node
from engine.ir.ops import Attention, Gemm, RowFactors
from engine.model import Model
from engine.packing import Packer
from engine.passes.unpad import Unpadded, unpad
from engine.plan.build import Constants, build
from engine.plan.plan import Plan
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda.architecture import SM_80, SM_90A
from engine.targets.cuda.families import PACKED, family_of, traits_of
from tests.engine.ir_interpreter import run
from tests.engine.passes.encoders import lengths_mask
from tests.engine.plan.executor import Array, window
from tests.engine.targets.cuda.harness import Runner
from tests.engine.targets.cuda.planning import CudaCapabilities, copies, launches

FIXTURES = Path(__file__).parents[3] / "fixtures"
TRAITS = traits_of(SM_90A)
STORAGE = {"f16": (DType.F16, 5e-3), "bf16": (DType.BF16, 4e-2)}  # with the bound of engine/precision.py


def unpadded(path: Path, storage: DType) -> tuple[Graph, Unpadded | str]:
    traits = replace(TRAITS, storage_type=storage)
    graph = passes.run(frontend.read(path), traits)
    return graph, unpad(graph, traits)


@pytest.mark.parametrize("storage", [DType.F16, DType.BF16])
def test_every_step_of_minilm_has_a_kernel(all_minilm_l6_v2: Path, storage: DType) -> None:
    _, result = unpadded(all_minilm_l6_v2 / "1" / "model.onnx", storage)
    assert isinstance(result, Unpadded), result
    sizes = {"batch": 8, "sequence": 128, "tokens": 520}
    plan = build(result.graph, sizes, CudaCapabilities(), Constants())
    assert launches(plan)
    assert copies(plan) == []
    assert sum(isinstance(step.op, Attention) and step.op.packed for step in plan.steps) == 6
    # Ids and types looked up, a norm, the layers of five steps, the last norm of the rows as they lie padded.
    assert len(plan.steps) == 34


@pytest.mark.parametrize(
    "name",
    [
        "bert-sdpa-dynamo-23",
        "bert_sentence-sdpa-optimum-14",
        "bert_segments-eager-legacy-13-ort",
        "distilbert-eager-legacy-14-ort",
        "gpt2-eager-legacy-13-ort",
        "clip_text-sdpa-dynamo-18",
        "llama-eager-legacy-17",
        "torch_encoder-eager-dynamo-18",
    ],
)
def test_every_step_of_other_spellings_has_a_kernel(name: str) -> None:
    _, result = unpadded(FIXTURES / f"{name}.onnx", DType.F16)
    assert isinstance(result, Unpadded), result
    batch, sequence = (str(dim) for dim in result.graph.inputs[0].shape)
    plan = build(result.graph, {batch: 4, sequence: 13, result.tokens: 24}, CudaCapabilities(), Constants())
    assert launches(plan)
    packed = [step.op.packed for step in plan.steps if isinstance(step.op, Attention)]
    assert packed == [True, True]


def test_other_types_and_gpus_run_padded(all_minilm_l6_v2: Path) -> None:
    path = all_minilm_l6_v2 / "1" / "model.onnx"
    _, single = unpadded(path, DType.F32)
    assert single == "no attention on packed sequences of f32 on this device"
    older = traits_of(SM_80)
    assert unpad(passes.run(frontend.read(path), older), older) == "the device has no attention on packed sequences"
    assert not PACKED.by_default


@pytest.mark.parametrize("kind", STORAGE)
@pytest.mark.parametrize("name", ["bert_legacy", "roberta_dynamo", "gpt2_dynamo"])
def test_packed_encoders_match_the_padded_graph(runner: Runner, name: str, kind: str) -> None:
    storage, tolerance = STORAGE[kind]
    graph, result = unpadded(FIXTURES / f"{name}.onnx", storage)
    assert isinstance(result, Unpadded), result
    mask = lengths_mask([3, 13, 1, 7], 13)
    feeds = {"ids": np.random.default_rng(0).integers(2, 24, mask.shape), "mask": mask}
    batch = Packer(result, PACKED).batch(feeds, {"batch": 4, "sequence": 13})
    assert batch.packed
    plan = build(result.graph, batch.sizes, CudaCapabilities(), Constants())
    (got,) = execute(runner, plan, dict(batch.arrays)).values()
    (want,) = run(frontend.read(FIXTURES / f"{name}.onnx"), feeds).values()
    assert not got[mask == 0].any()
    wide = got[mask == 1].astype(np.float64)
    assert np.linalg.norm(wide - want[mask == 1]) / np.linalg.norm(want[mask == 1]) <= tolerance
    assert graph.outputs[0].dtype is DType.of(got.dtype)


@pytest.mark.parametrize("apart", [False, True])
def test_divided_rows_are_packed_with_their_factors(apart: bool) -> None:
    """Those that a product finds, and those of nodes of their own."""
    graph = passes.run(frontend.read(FIXTURES / "gpt2_dynamo.onnx"), TRAITS)
    for node in list(graph.nodes) if apart else []:
        if isinstance(node.op, Gemm) and node.op.factors is not None:
            (x, factors), epsilon = node.outputs, node.op.factors
            node.op, node.outputs = replace(node.op, factors=None), (x,)
            graph.nodes.insert(graph.nodes.index(node) + 1, Node(RowFactors(epsilon), (x,), (factors,)))
    graph.validate()
    result = unpad(graph, TRAITS)
    assert isinstance(result, Unpadded), result
    found = [node.op for node in result.graph.nodes]
    assert sum(isinstance(op, Gemm) and op.divided for op in found) == 3
    assert sum(isinstance(op, RowFactors) for op in found) == (3 if apart else 0)
    mask = lengths_mask([3, 13, 1, 7], 13)
    feeds = {"ids": np.random.default_rng(0).integers(2, 24, mask.shape), "mask": mask}
    batch = Packer(result, PACKED).batch(feeds, {"batch": 4, "sequence": 13})
    (got,) = run(result.graph, batch.arrays, batch.sizes).values()
    (want,) = run(graph, feeds).values()
    np.testing.assert_allclose(got[mask == 1], want[mask == 1], rtol=0, atol=2e-2)


def execute(runner: Runner, plan: Plan, feeds: dict[str, Array]) -> dict[str, Array]:
    """The outputs of a plan whose steps a GPU, or the emulator, computes."""
    memory: dict[Buffer, Array] = {}
    twins: dict[Buffer, Buffer] = {}
    for tensor in (t for step in plan.steps for t in (*step.inputs, *step.outputs)):
        buffer = tensor.buffer
        if buffer.kind is BufferKind.INPUT:
            memory[buffer] = np.ascontiguousarray(feeds[buffer.name]).reshape(-1).view(np.uint8)
        elif buffer.data is not None:
            memory[buffer] = np.ascontiguousarray(buffer.data).reshape(-1).view(np.uint8)
        else:
            memory.setdefault(buffer, np.full(buffer.nbytes, 0xFF, np.uint8))

    def handed_in(tensor: Tensor) -> Tensor:
        """An operand as what runs a single step wants it: of a buffer that is filled before."""
        if tensor.buffer.kind is not BufferKind.ARENA:
            return tensor
        if tensor.buffer not in twins:
            twins[tensor.buffer] = Buffer(tensor.buffer.name, BufferKind.INPUT, tensor.buffer.nbytes)
            memory[twins[tensor.buffer]] = memory[tensor.buffer]
        return replace(tensor, buffer=twins[tensor.buffer])

    def handed_out(tensor: Tensor) -> Tensor:
        """A result that lies alone: what runs a single step has no arena."""
        return replace(tensor, buffer=Buffer(tensor.buffer.name, BufferKind.OUTPUT, tensor.buffer.nbytes))

    for planned in plan.steps:
        step = replace(
            planned, inputs=tuple(map(handed_in, planned.inputs)), outputs=tuple(map(handed_out, planned.outputs))
        )
        lowered = family_of(step.op).lower(step, runner.context)
        for launch in lowered:
            assert runner.prepare(launch.kernel) is None
        results = runner.run(step, lowered, [np.ascontiguousarray(window(t, memory)) for t in step.inputs])
        for tensor, array in zip(planned.outputs, results, strict=True):
            window(tensor, memory)[...] = array.reshape(tensor.shape)
    return {name: window(tensor, memory).copy() for name, tensor in plan.outputs.items()}


def test_the_runtime_takes_both_graphs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake GPU (fake_cupy.py): hidden inputs are copied like the others, weights are there once."""
    pytest.importorskip("cupy")
    pytest.importorskip("cuda.bindings.nvrtc")
    from engine.targets.cuda.target import CudaTarget
    from tests.engine.targets.cuda.fake_cupy import fake_gpu

    def feeds(lengths: list[int], sequence: int) -> dict[str, Array]:
        mask = lengths_mask(lengths, sequence)
        return {"ids": np.random.default_rng(len(lengths)).integers(2, 24, mask.shape), "mask": mask}

    with fake_gpu(monkeypatch) as gpu:
        target, other = CudaTarget(), CudaTarget()
        graph = passes.run(frontend.read(FIXTURES / "bert_legacy.onnx"), target.traits)
        with (
            Model(graph, target, unpadded=unpad(graph, target.traits)) as packed,
            Model(graph, other, unpadded="switched off") as padded,
        ):
            for lengths, sequence in (([3, 13, 1, 7], 13), ([5, 5], 5), ([13, 1], 13), ([3, 13, 1, 7], 13)):
                given = feeds(lengths, sequence)
                (got,), (want,) = packed.run(given).values(), padded.run(given).values()
                np.testing.assert_allclose(got, want * given["mask"][..., None], rtol=0, atol=1e-2)
            assert packed.plans_ready == 3  # packed, padded (nothing to leave out), packed
            assert packed.memory()["weights"] == padded.memory()["weights"]
            sizes = packed.pack(feeds([3, 13, 1, 7], 13))
            assert sizes is not None
            bound = packed.bind(sizes.sizes)
            for name, array in bound.inputs.items():
                array.set(sizes.arrays[name])
            bound.launch()
            assert not gpu.violations
