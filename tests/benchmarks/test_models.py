"""The architectures of the benchmarks compute what ONNX Runtime computes of them, and their outputs mean something."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

import engine
from benchmarks.models import ARCHITECTURES, build
from benchmarks.models.photos import photos
from engine import frontend, passes
from engine.ir import ops
from engine.ir.graph import Graph
from engine.plan.memory import SLACK
from engine.targets.cuda import depthwise_rows
from tests.benchmarks.test_conv_cases import graph_of
from tests.engine.targets.cuda.planning import copies, cuda_plan, cuda_traits, launches, least_arena

TOLERANCE = 2e-5  # relative L2 in fp32, through up to 53 convolutions

# Steps of each plan: fused operators, none more.
STEPS = {
    "mobilenet_v2": 54,
    "efficientnet_b0": 115,
    "resnet50": 55,
    "vgg16": 21,
    "vit_b_16": 87,
    "bert_base": 86,
    "gpt2": 85,
}
SLOW = {"vgg16", "bert_base", "vit_b_16"}


def _feeds(name: str) -> dict[str, np.ndarray]:
    if ARCHITECTURES[name].symbols == ("batch",):
        return {"input": photos()[:2]}
    ids = np.random.default_rng(0).integers(0, 30_000, (2, 17))
    if name == "gpt2":
        return {"input_ids": ids}
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else []) for name in ARCHITECTURES]
)
def test_matches_onnx_runtime(name: str) -> None:
    content = build(name).model.SerializeToString()
    feeds = _feeds(name)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    expected = session.run(None, dict(feeds))[0]
    del session
    assert 0.1 < expected.std() < 100
    with engine.load(content, device="cpu", strict=True) as model:
        ((output, got),) = model.run(feeds).items()
        model.clear_padding({output: expected}, feeds)
        shape = next(iter(feeds.values())).shape
        plan = model.plan(dict(zip(ARCHITECTURES[name].symbols, shape, strict=False)))
        assert len(plan.steps) <= STEPS[name]
        assert not any(isinstance(step.op, ops.Opaque) for step in plan.steps)
    assert np.linalg.norm(got - expected) <= TOLERANCE * np.linalg.norm(expected)
    _check_cuda_plans(name, content)


def _check_cuda_plans(name: str, content: bytes) -> None:
    """On a GPU a step is one of the fused operators, from one image to many, and the arena holds what lives at once."""
    graph = passes.run(frontend.read(content), cuda_traits())
    for batch in (1, 128):
        plan = cuda_plan(graph, dict(zip(ARCHITECTURES[name].symbols, (batch, 128), strict=False)), storage=None)
        assert len(plan.steps) <= STEPS[name]
        assert copies(plan) == []
        assert plan.arena_bytes <= 1.02 * (least_arena(plan) + SLACK)
    assert launches(plan)


def test_squeeze_and_excite_blocks_are_part_of_the_depthwise_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen blocks of EfficientNet-B0: a pool, two layers and their launches less each, and no step, copy or byte
    more in their place."""

    def with_traits(**traits: bool) -> Graph:
        return passes.run(graph_of("efficientnet_b0"), replace(cuda_traits(), **traits))

    apart, pooled, excited = with_traits(), with_traits(conv_means=True), with_traits(conv_means=True, excitations=True)
    scaled = with_traits(conv_means=True, excitations=True, scaled_weights=True)
    gated = cuda_plan(scaled, {"batch": 128}, storage=None)
    products = [step for step in gated.steps if isinstance(step.op, ops.Gemm) and len(step.outputs[0].shape) == 3]
    assert [step.outputs[0].shape[1:] for step in products] == [
        (112**2, 16), (56**2, 24), (56**2, 24), (28**2, 40), (28**2, 40)
    ]  # fmt: skip
    assert copies(gated) == []
    assert len(gated.steps) == 115 - 48
    assert launches(gated)
    for taken in (True, False):
        if not taken:
            monkeypatch.setattr(depthwise_rows, "pick", lambda *_, **__: None)
        for batch in (1, 128):
            plans = [cuda_plan(graph, {"batch": batch}, storage=None) for graph in (apart, pooled, excited)]
            assert [len(plan.steps) for plan in plans] == [115, 115 - 16, 115 - 48]
            assert [copies(plan) for plan in plans] == [[], [], []]
            joined = [step for step in plans[1].steps if isinstance(step.op, ops.ConvMean)]
            moved = [sum(step.cost.bytes for step in plan.steps) for plan in plans]
            assert moved[0] - moved[1] == sum(step.outputs[0].nbytes for step in joined)
            assert moved[2] < moved[1]
            flops = {sum(step.cost.flops for step in plan.steps) for plan in plans}
            assert max(flops) < 1.001 * min(flops)
            found = [launches(plan) for plan in plans]
            sums = [sum("sums" in dict(launch.arguments) for launch in each) for each in found]
            assert sums[0] == 0
            assert 0 < sums[1] == sums[2] <= 16 if taken else sums == [0, 0, 0]
            before = len(found[0])
            assert [len(each) for each in found] == [before, before, before - 16 - sums[2]]


def test_the_statistics_of_batch_normalisation_are_those_of_photos() -> None:
    weights = build("mobilenet_v2").weights
    variances = [tensor for name, tensor in weights.items() if name.endswith("running_var")]
    assert len(variances) == 52
    assert all(tensor.min() > 0 for tensor in variances)
    assert not any(np.allclose(tensor, 1.0, atol=1e-3) for tensor in variances)


def test_the_same_weights_every_time() -> None:
    first, second = (build("mobilenet_v2").weights for _ in range(2))
    assert all(np.array_equal(first[name], tensor) for name, tensor in second.items())
