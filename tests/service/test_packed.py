"""Batches of packed rows on the real engine, from the queue to the answers: what is computed, and that it is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import engine
from service.batching.batcher import assemble, scatter
from service.batching.policy import BatchAxes
from service.batching.queue import Batch, Entry, ModelQueue, make_entry
from service.workers.messages import BatchingMode, BatchingOptions, Infer, LoadModel, LocalTensor, ModelKey
from service.workers.warmup import probe

KEY = ModelKey("all-minilm-l6-v2", 1)
OPTIONS = BatchingOptions(max_batch=12, max_tokens=256)
# Rows of size 1: sums of up to 1,536 products in fp32, in another order where other rows share the tiles.
ATOL = 1e-5


@pytest.fixture(scope="module")
def model(all_minilm_l6_v2: Path) -> Iterator[engine.Model]:
    with engine.load(all_minilm_l6_v2 / "1" / "model.onnx", device="cpu", threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def axes(model: engine.Model) -> BatchAxes:
    axes = probe(model, LoadModel(KEY, "", "cpu", "fp32", 2, OPTIONS, None), engine.EngineError)
    assert axes.mode is BatchingMode.PACKED
    assert "what 'attention_mask' hides is not computed" in axes.reason
    return axes


def rows_of(lengths: list[int], rng: np.random.Generator) -> dict[str, np.ndarray]:
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = rng.integers(1000, 20000, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def entry_of(number: int, arrays: dict[str, np.ndarray], lengths: tuple[int, ...], axes: BatchAxes) -> Entry:
    inputs = tuple((name, LocalTensor(array)) for name, array in arrays.items())
    return make_entry(Infer(number, KEY, inputs, ("last_hidden_state",), lengths, 0.0, 1e9, 50), axes)


def run_all(queue: ModelQueue, model: engine.Model) -> list[Batch]:
    """Run a queue dry; every batch, of which the engine has computed what the queue expected."""
    batches = []
    while (batch := queue.take(0.0)) is not None:
        scatter(batch, model.run(assemble(batch)), queue.axes)
        sizes = model.plan_profiles()[-1].sizes
        assert batch.computed == sizes.get("tokens", sizes["batch"] * sizes["sequence"])
        assert batch.rows <= OPTIONS.max_batch
        assert batch.rows == 1 or batch.computed <= OPTIONS.max_tokens
        batches.append(batch)
    return batches


def check(entry: Entry, arrays: dict[str, np.ndarray], lengths: list[int], model: engine.Model) -> None:
    """Every row is what the model makes of it alone, without padding; behind its end are zeros."""
    got = entry.outputs["last_hidden_state"]
    assert got.shape[:2] == arrays["input_ids"].shape
    for row, length in enumerate(lengths):
        alone = model.run({name: array[row : row + 1, :length].copy() for name, array in arrays.items()})
        np.testing.assert_allclose(got[row, :length], alone["last_hidden_state"][0], rtol=0, atol=ATOL)
        assert not got[row, length:].any()


@pytest.mark.parametrize("seed", range(4))
def test_mixed_lengths_in_a_batch_give_what_each_row_gives_alone(
    model: engine.Model, axes: BatchAxes, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    queue = ModelQueue(OPTIONS, axes)
    entries = []
    for number in range(10):
        lengths = [int(n) for n in np.clip(rng.gamma(1.5, 20, rng.integers(1, 4)), 1, 200)]
        arrays = rows_of(lengths, rng)
        entry = entry_of(number, arrays, tuple(lengths), axes)
        entries.append((entry, arrays, lengths))
        queue.push(entry)
    batches = run_all(queue, model)
    assert any(batch.rows > 1 for batch in batches)
    real, computed, padded = (
        sum(get(batch) for batch in batches)
        for get in (lambda b: b.tokens, lambda b: b.computed, lambda b: b.rows * b.width)
    )
    assert real == sum(sum(lengths) for _, _, lengths in entries)
    assert real <= computed < 1.2 * real < padded, "numbers of tokens are rounded up by a ninth at most, above 64"
    for entry, arrays, lengths in entries:
        check(entry, arrays, lengths, model)


def test_masks_of_clients_are_packed_where_they_can_be(model: engine.Model, axes: BatchAxes) -> None:
    rng = np.random.default_rng(9)
    lengths = [3, 40, 17]
    padded = rows_of(lengths, rng)
    holes = rows_of([20, 20], rng)
    holes["attention_mask"][0, 5:9] = 0
    queue = ModelQueue(OPTIONS, axes)
    entries = [entry_of(number, arrays, (), axes) for number, arrays in enumerate((padded, holes))]
    for entry in entries:
        queue.push(entry)
    batches = run_all(queue, model)
    assert [(batch.rows, batch.tokens, batch.computed) for batch in batches] == [(3, 60, 64), (2, 40, 48)]
    check(entries[0], padded, lengths, model)
    expected = model.run(holes)["last_hidden_state"]
    np.testing.assert_allclose(entries[1].outputs["last_hidden_state"], expected, rtol=0, atol=ATOL)


def test_rows_of_one_length_run_as_they_are(model: engine.Model, axes: BatchAxes) -> None:
    """Where there is nothing to leave out, the engine runs the padded graph, and the queue knows."""
    rng = np.random.default_rng(2)
    queue = ModelQueue(OPTIONS, axes)
    arrays = rows_of([32] * 8, rng)
    queue.push(entry_of(1, arrays, (32,) * 8, axes))
    (batch,) = run_all(queue, model)
    assert (batch.tokens, batch.computed, batch.width) == (256, 256, 32)
    assert "tokens" not in model.plan_profiles()[-1].sizes
