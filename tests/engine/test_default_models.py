"""The two default models end to end on the CPU: against ONNX Runtime, their plans, their FLOPs, their memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import engine
from engine.cli.check import relative_error
from engine.ir import ops
from engine.plan.tensor import BufferKind

TOLERANCE = 1e-5  # relative L2, fp32 on both sides: about 80 roundings deep


@pytest.fixture(scope="module")
def efficientnet(efficientnet_lite0: Path) -> Iterator[tuple[engine.Model, onnxruntime.InferenceSession]]:
    yield from _pair(efficientnet_lite0 / "1" / "model.onnx")


@pytest.fixture(scope="module")
def minilm(all_minilm_l6_v2: Path) -> Iterator[tuple[engine.Model, onnxruntime.InferenceSession]]:
    yield from _pair(all_minilm_l6_v2 / "1" / "model.onnx")


def _pair(path: Path) -> Iterator[tuple[engine.Model, onnxruntime.InferenceSession]]:
    with engine.load(path, device="cpu", strict=True) as model:
        yield model, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


Pair = tuple[engine.Model, onnxruntime.InferenceSession]


def token_feeds(batch: int, sequence: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens; the rows of a batch have different lengths, so that the mask matters."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, sequence), np.int64)
    for row in range(1, batch):
        mask[row, rng.integers(1, sequence + 1) :] = 0
    ids = rng.integers(0, 30522, (batch, sequence)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def image_feeds(batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(seed).standard_normal((batch, 3, 224, 224)).astype(np.float32)}


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_efficientnet_matches_onnx_runtime(efficientnet: Pair, batch: int) -> None:
    model, session = efficientnet
    feeds = image_feeds(batch)
    logits = model.run(feeds)["logits"]
    assert relative_error(logits, session.run(["logits"], feeds)[0]) <= TOLERANCE
    for row in range(batch):
        alone = model.run({"input": feeds["input"][row : row + 1]})["logits"]
        assert relative_error(logits[row : row + 1], alone) <= TOLERANCE


@pytest.mark.parametrize(("batch", "sequence"), list(itertools.product([1, 3, 8], [1, 7, 64, 512])))
def test_minilm_matches_onnx_runtime(minilm: Pair, batch: int, sequence: int) -> None:
    model, session = minilm
    feeds = token_feeds(batch, sequence)
    hidden = model.run(feeds)["last_hidden_state"]
    # Padded positions are 0, where ONNX Runtime has what the encoder makes of padding.
    expected = session.run(["last_hidden_state"], feeds)[0] * feeds["attention_mask"][..., None].astype(np.float32)
    assert relative_error(hidden, expected) <= TOLERANCE
    for row in range(batch):
        length = int(feeds["attention_mask"][row].sum())
        alone = model.run({name: array[row : row + 1, :length] for name, array in feeds.items()})["last_hidden_state"]
        assert relative_error(hidden[row : row + 1, :length], alone) <= TOLERANCE


def test_efficientnet_plan_is_short_and_materialises_nothing(efficientnet: Pair) -> None:
    model, _ = efficientnet
    plan = model.plan({"batch": 1})
    assert len(plan.steps) <= 52
    assert not any(isinstance(step.op, ops.Opaque) for step in plan.steps)
    # The largest activation is the first expansion: 96 channels of 112×112; im2col of the stem alone would be 27/32 of
    # its output and that of a 5×5 convolution 25 times its input.
    largest = 96 * 112 * 112 * 4
    arena = [buffer for buffer in plan.buffers if buffer.kind is BufferKind.ARENA]
    assert max(buffer.nbytes for buffer in arena) == largest
    assert plan.arena_bytes < plan.unshared_bytes / 3


def test_minilm_plan_is_short_and_never_holds_scores(minilm: Pair) -> None:
    model, _ = minilm
    plan = model.plan({"batch": 2, "sequence": 512})
    assert len(plan.steps) <= 46
    assert not any(isinstance(step.op, ops.Opaque) for step in plan.steps)
    assert sum(isinstance(step.op, ops.Attention) for step in plan.steps) == 6
    # Nothing grows with the square of the length: the largest buffer is the 1,536-wide feed-forward layer.
    arena = [buffer for buffer in plan.buffers if buffer.kind is BufferKind.ARENA]
    assert max(buffer.nbytes for buffer in arena) == 2 * 512 * 1536 * 4


# EfficientNet-Lite0 as in the paper's table (Tan & Le 2019) with the "lite" changes: no squeeze-and-excite, ReLU6,
# stem and head not scaled: (expansion, channels out, repeats, first stride, kernel).
BLOCKS = [(1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
          (6, 320, 1, 1, 3)]  # fmt: skip


def efficientnet_flops_by_hand() -> int:
    """2 per multiply-add; 1 for each bias; 2 for each ReLU6; 1 for each residual addition."""
    relu6, bias = 2, 1
    size, channels = 112, 32
    total = size * size * 32 * (2 * 27 + bias + relu6)
    for expansion, out, repeats, first_stride, kernel in BLOCKS:
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            wide = channels * expansion
            if expansion > 1:
                total += size * size * wide * (2 * channels + bias + relu6)
            size //= stride
            total += size * size * wide * (2 * kernel * kernel + bias + relu6)
            total += size * size * out * (2 * wide + bias + (stride == 1 and channels == out))
            channels = out
    total += size * size * 1280 * (2 * 320 + bias + relu6)
    total += 1280 * size * size
    return total + 1000 * (2 * 1280 + bias)


@pytest.mark.parametrize("batch", [1, 5])
def test_efficientnet_flops_are_those_counted_by_hand(efficientnet: Pair, batch: int) -> None:
    model, _ = efficientnet
    counted = sum(step.cost.flops for step in model.plan({"batch": batch}).steps)
    assert counted == pytest.approx(batch * efficientnet_flops_by_hand(), rel=0.02)


def test_kernel_stats_add_up_to_the_runs_made(efficientnet_lite0: Path) -> None:
    with engine.load(efficientnet_lite0 / "1" / "model.onnx", device="cpu") as model:
        for _ in range(3):
            model.run(image_feeds(1))
        plan = model.plan({"batch": 1})
        stats = model.kernel_stats()
        assert sum(stat.launches for stat in stats) == 3 * len(plan.steps)
        assert sum(stat.flops for stat in stats) == 3 * sum(step.cost.flops for step in plan.steps)
        assert sum(stat.bytes for stat in stats) == 3 * sum(step.cost.bytes for step in plan.steps)
        assert all(stat.seconds > 0 for stat in stats)


@pytest.mark.slow
def test_hundreds_of_shapes_stay_within_the_plan_cache(all_minilm_l6_v2: Path) -> None:
    """600 different (batch, sequence): the cache keeps its bound, and so does the process."""
    limit = 4 << 20
    with engine.load(all_minilm_l6_v2 / "1" / "model.onnx", device="cpu", plan_cache_bytes=limit) as model:
        resident = []
        pairs = itertools.product(range(1, 201), repeat=2)
        for batch, sequence in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair))[:600]:
            model.run(token_feeds(batch, sequence))
            assert model.memory()["plans"] <= limit
            resident.append(_resident_bytes())
        assert 0 < model.plans_ready < 600
        assert max(resident[300:]) - max(resident[:300]) < 48 << 20


def _resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096
