"""The queue, the policy and the batch maker, without threads: what may share a batch; nothing is lost or mixed."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batching.batcher import assemble, scatter
from service.batching.policy import BatchAxes, bucket_of, capacity, find_axes, prefix_lengths
from service.batching.queue import Batch, Entry, ModelQueue, make_entry
from service.workers.messages import BatchingMode, BatchingOptions, Infer, LocalTensor, ModelKey, TensorInfo
from tests.service.fakes import HIDDEN, KINDS, VOCABULARY

KEY = ModelKey("m", 1)


def infos(kind: str) -> tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]:
    inputs, outputs, _ = KINDS[kind]
    return tuple(TensorInfo(s.name, s.dtype, s.shape) for s in inputs), tuple(
        TensorInfo(s.name, s.dtype, s.shape) for s in outputs
    )


def info(name: str, dtype: str, *shape: int | str) -> TensorInfo:
    return TensorInfo(name, np.dtype(dtype), shape)


def request(number: int, arrays: dict[str, np.ndarray], lengths: tuple[int, ...] = (), **changes: Any) -> Infer:
    values = {"arrival": 0.0, "deadline": 1e9, "priority": 50, "outputs": ("last_hidden_state",), **changes}
    inputs = tuple((name, LocalTensor(array)) for name, array in arrays.items())
    return Infer(id=number, key=KEY, inputs=inputs, lengths=lengths, **values)


def token_rows(lengths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), max(lengths)), np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = generator.integers(1, VOCABULARY, length)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("identity", BatchingMode.ROWS),
        ("colours", BatchingMode.ROWS),
        ("fixed", BatchingMode.NONE),
        ("strings", BatchingMode.ROWS),
        ("one_row", BatchingMode.NONE),
        ("encoder", BatchingMode.PADDED),
        ("text_classes", BatchingMode.PADDED),
        ("maskless", BatchingMode.ROWS),
    ],
)
def test_axes_of_a_model_say_how_it_may_be_batched(kind: str, mode: BatchingMode) -> None:
    assert find_axes(*infos(kind)).mode is mode


def test_what_keeps_a_model_from_being_batched_is_named() -> None:
    float32 = np.dtype("float32")
    batched, fixed = TensorInfo("x", float32, ("batch", 4)), TensorInfo("y", float32, (1, 4))
    scalar, other = TensorInfo("s", float32, ()), TensorInfo("z", float32, ("n", 4))
    cases = [
        ((fixed,), (batched,), "the first dim of input 'y' is 1; batching needs one open dim"),
        ((batched, scalar), (batched,), "the first dim of input 's' does not exist, not 'batch'"),
        ((batched,), (other,), "the first dim of output 'z' is n, not 'batch'"),
    ]
    for inputs, outputs, words in cases:
        assert words in find_axes(inputs, outputs).reason


def test_no_batching_where_an_output_lacks_the_batch_symbol() -> None:
    axes = find_axes([info("x", "float32", "n", 4)], [info("y", "float32", "n", 4), info("total", "float32")])
    assert axes.mode is BatchingMode.NONE
    assert "first dim" in axes.reason


def test_no_batching_where_the_batch_symbol_is_another_dim_too() -> None:
    assert find_axes([info("x", "float32", "n", 4)], [info("y", "float32", "n", "n")]).mode is BatchingMode.NONE


def test_no_batching_where_inputs_name_the_first_dim_differently() -> None:
    inputs = [info("a", "float32", "n", 4), info("b", "float32", "m", 4)]
    assert find_axes(inputs, [info("y", "float32", "n", 4)]).mode is BatchingMode.NONE


def test_no_padding_where_an_output_has_a_dim_of_unknown_origin() -> None:
    inputs, _ = infos("encoder")
    assert find_axes(inputs, [info("y", "float32", "batch", "kept", 4)]).mode is BatchingMode.ROWS


@given(length=st.integers(1, 5000))
def test_a_bucket_holds_its_length_and_bounds_the_padding(length: int) -> None:
    edge = bucket_of(length, BatchingOptions().buckets)
    assert length <= edge
    assert edge <= 8 or edge <= 2 * length


def rounded(rows: int, width: int, tokens: int) -> int:
    """What an engine computes of packed rows: their tokens, up to a step, where that is less than all."""
    return min(-(-tokens // 16) * 16, rows * width)


def packed_axes() -> BatchAxes:
    return find_axes(*infos("encoder")).packed("attention_mask", rounded)


def run_all(queue: ModelQueue, entries: list[Entry], kind: str) -> list[Batch]:
    """Run a queue dry; returns every batch."""
    compute = KINDS[kind][2]
    batches = []
    done: list[Entry] = []
    while (batch := queue.take(now=1.0)) is not None:
        outputs = compute(assemble(batch))
        done += scatter(batch, outputs, queue.axes)
        batches.append(batch)
    assert sorted(id(e) for e in done) == sorted(id(e) for e in entries)
    return batches


@settings(deadline=None, max_examples=60)
@given(
    requests=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=9), min_size=1, max_size=12),
    max_batch=st.integers(1, 8),
    max_tokens=st.integers(1, 128),
    kind=st.sampled_from(["encoder", "maskless"]),
    packed=st.booleans(),
)
def test_batched_rows_equal_single_rows(
    requests: list[list[int]], max_batch: int, max_tokens: int, kind: str, packed: bool
) -> None:
    """Any mix of requests, split and batched in any way, gives each row what it gets alone; budgets hold, of tokens
    that are computed: of the rows' own where they are packed."""
    options = BatchingOptions(max_batch=max_batch, max_tokens=max_tokens)
    packed = packed and kind == "encoder"
    axes = packed_axes() if packed else find_axes(*infos(kind))
    queue = ModelQueue(options, axes)
    compute = KINDS[kind][2]
    entries, feeds = [], []
    for number, lengths in enumerate(requests):
        arrays = token_rows(lengths, seed=number)
        arrays = arrays if kind == "encoder" else {"input_ids": arrays["input_ids"]}
        entries.append(make_entry(request(number, arrays, tuple(lengths)), axes))
        feeds.append(arrays)
        queue.push(entries[-1])
    assert queue.cost == sum(map(sum, requests))
    batches = run_all(queue, entries, kind)
    assert queue.cost == 0
    assert sum(batch.tokens for batch in batches) == sum(map(sum, requests))
    for batch in batches:
        assert batch.rows <= max_batch
        load = rounded(batch.rows, batch.width, batch.tokens) if packed else batch.rows * batch.width
        assert batch.computed == load >= batch.tokens
        assert batch.rows == 1 or load <= max_tokens
    for entry, arrays, lengths in zip(entries, feeds, requests, strict=True):
        got = entry.outputs["last_hidden_state"]
        assert got.shape == (len(lengths), max(lengths), HIDDEN)
        for row, length in enumerate(lengths):
            alone = compute({name: array[row : row + 1, :length] for name, array in arrays.items()})
            np.testing.assert_allclose(got[row, :length], alone["last_hidden_state"][0], rtol=1e-5, atol=1e-6)
            assert not got[row, length:].any()


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    max_batch=st.integers(1, 12),
    max_tokens=st.integers(1, 200),
)
def test_packed_rows_go_in_their_order_and_fill_every_batch(
    lengths: list[int], max_batch: int, max_tokens: int
) -> None:
    """Whatever their lengths: a batch ends where the next row is too much, so no row is passed over."""
    options = BatchingOptions(max_batch=max_batch, max_tokens=max_tokens)
    queue = ModelQueue(options, packed_axes())
    entries = [make_entry(request(i, token_rows([n]), (n,)), queue.axes) for i, n in enumerate(lengths)]
    for entry in entries:
        queue.push(entry)
    batches = run_all(queue, entries, "encoder")
    assert [part.entry.request.id for batch in batches for part in batch.parts] == list(range(len(lengths)))
    for batch, following in pairwise(batches):
        more = following.parts[0].entry.lengths[0]
        width = bucket_of(max(batch.width, more), options.buckets)
        assert batch.rows == max_batch or rounded(batch.rows + 1, width, batch.tokens + more) > max_tokens


def test_a_long_row_is_not_overtaken_by_short_ones_that_keep_coming() -> None:
    queue = ModelQueue(BatchingOptions(max_batch=64, max_tokens=100), packed_axes())
    numbers = iter(range(1, 1000))

    def short_ones() -> None:
        for _ in range(20):
            queue.push(make_entry(request(next(numbers), token_rows([9]), (9,)), queue.axes))

    short_ones()
    queue.push(make_entry(request(0, token_rows([95]), (95,)), queue.axes))
    ahead, taken = 20, list[int]()
    while 0 not in taken:
        short_ones()
        batch = queue.take(0.0)
        assert batch is not None
        taken += [part.entry.request.id for part in batch.parts]
    assert len(taken) == ahead + 1


def test_packed_rows_are_handed_over_in_few_widths() -> None:
    """A width of its own would be another plan of the engine."""
    queue = ModelQueue(BatchingOptions(max_batch=2, buckets=(16, 64)), packed_axes())
    for number, length in enumerate((1, 17, 3, 60, 9, 16)):
        queue.push(make_entry(request(number, token_rows([length]), (length,)), queue.axes))
    batches = list(iter(lambda: queue.take(0.0), None))
    assert [(batch.width, batch.tokens, batch.computed) for batch in batches] == [
        (64, 18, 32),
        (64, 63, 64),
        (16, 25, 32),
    ]
    assert len({batch.shape for batch in batches}) == 3


def test_a_mask_of_the_client_says_what_packed_rows_cost() -> None:
    """Rows that come padded: what is hidden is not computed, and still has its place in the answer."""
    arrays = {"input_ids": np.full((2, 40), 7), "attention_mask": np.tri(2, 40, 1, np.int64)}
    queue = ModelQueue(BatchingOptions(max_tokens=20), packed_axes())
    entry = make_entry(request(1, arrays), queue.axes)
    assert (entry.cost, entry.packed) == (2 + 3, True)
    queue.push(entry)
    (batch,) = run_all(queue, [entry], "encoder")
    assert (batch.rows, batch.tokens, batch.computed) == (2, 5, 16)
    expected = KINDS["encoder"][2](arrays)["last_hidden_state"]
    np.testing.assert_allclose(entry.outputs["last_hidden_state"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", [[1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1]])
def test_a_mask_that_the_engine_does_not_pack_keeps_to_itself(row: list[int]) -> None:
    """The engine would run the whole batch padded, and the budget is of what it computes."""
    queue = ModelQueue(BatchingOptions(max_batch=8, max_tokens=32), packed_axes())
    arrays = {"input_ids": np.full((5, 6), 7), "attention_mask": np.array([[1, 1, 1, 0, 0, 0]] * 4 + [row])}
    odd = make_entry(request(1, arrays), queue.axes)
    assert (odd.cost, odd.packed) == (30, False)
    others = [make_entry(request(i, token_rows([length]), (length,)), queue.axes) for i, length in ((2, 3), (3, 16))]
    for entry in (odd, *others):
        queue.push(entry)
    batches = run_all(queue, [odd, *others], "encoder")
    assert [(batch.rows, batch.width, batch.tokens, batch.computed) for batch in batches] == [
        (4, 8, 24, 32), (1, 8, 6, 8), (2, 16, 19, 32),
    ]  # fmt: skip
    expected = KINDS["encoder"][2](arrays)["last_hidden_state"]
    np.testing.assert_allclose(odd.outputs["last_hidden_state"], expected, rtol=1e-5, atol=1e-6)


@given(
    rows=st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=3),
    kind=st.sampled_from("?if"),
    most=st.sampled_from([1, 1, 2]),
)
def test_lengths_of_a_mask_are_those_of_ones_that_zeros_follow(rows: list[list[int]], kind: str, most: int) -> None:
    mask = np.array(rows, kind) * np.array(most, kind)
    texts = ["".join(str(int(one)) for one in row) for row in mask]
    whole = all(re.fullmatch("1+0*", text) for text in texts)
    expected = tuple(text.count("1") for text in texts) if whole else None
    assert prefix_lengths(mask) == expected
    assert prefix_lengths(mask[:, :0]) is None


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=10), max_batch=st.integers(1, 8))
def test_a_request_larger_than_a_batch_is_split_and_put_together_again(sizes: list[int], max_batch: int) -> None:
    axes = find_axes(*infos("identity"))
    queue = ModelQueue(BatchingOptions(max_batch=max_batch), axes)
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal((size, 4)).astype(np.float32) for size in sizes]
    entries = [make_entry(request(i, {"input": a}, outputs=("output",)), axes) for i, a in enumerate(arrays)]
    for entry in entries:
        queue.push(entry)
    batches = run_all(queue, entries, "identity")
    assert len(batches) == -(-sum(sizes) // max_batch)
    for entry, array in zip(entries, arrays, strict=True):
        np.testing.assert_array_equal(entry.outputs["output"], array)


def test_rows_of_different_shape_never_share_a_batch() -> None:
    shape = ("n", "height")
    axes = find_axes([info("x", "float32", *shape)], [info("y", "float32", *shape)])
    queue = ModelQueue(BatchingOptions(), axes)
    for number, width in enumerate((3, 4, 3)):
        queue.push(make_entry(request(number, {"x": np.zeros((1, width), np.float32)}), axes))
    taken = [[part.entry.request.id for part in batch.parts] for batch in iter(lambda: queue.take(0.0), None)]
    assert taken == [[0, 2], [1]]


def test_a_model_without_batch_axis_runs_one_request_at_a_time() -> None:
    axes = find_axes(*infos("fixed"))
    queue = ModelQueue(BatchingOptions(), axes)
    for number in range(3):
        queue.push(make_entry(request(number, {"input": np.ones((2, 4), np.float32)}), axes))
    assert [len(batch.parts) for batch in iter(lambda: queue.take(0.0), None)] == [1, 1, 1]


def test_an_urgent_request_goes_before_those_that_came_earlier() -> None:
    axes = find_axes(*infos("identity"))
    queue = ModelQueue(BatchingOptions(max_batch=1), axes)
    for number, priority in enumerate((50, 50, 1)):
        queue.push(make_entry(request(number, {"input": np.ones((1, 4), np.float32)}, priority=priority), axes))
    taken = [batch.parts[0].entry.request.id for batch in iter(lambda: queue.take(0.0), None)]
    assert taken == [2, 0, 1]


def test_removing_a_request_gives_its_waiting_cost_back() -> None:
    axes = find_axes(*infos("encoder"))
    queue = ModelQueue(BatchingOptions(max_batch=2), axes)
    queue.push(make_entry(request(1, token_rows([5, 5, 5, 30]), (5, 5, 5, 30)), axes))
    queue.push(make_entry(request(2, token_rows([7]), (7,)), axes))
    assert queue.cost == 52
    queue.take(0.0)
    assert queue.cost == 42
    queue.remove(1)
    assert queue.cost == 7
    batch = queue.take(0.0)
    assert batch is not None
    assert [part.entry.request.id for part in batch.parts] == [2]
    assert queue.take(0.0) is None
    assert queue.cost == 0


def test_a_batch_waits_for_company_only_as_long_as_it_may_and_not_when_full() -> None:
    axes = find_axes(*infos("identity"))
    queue = ModelQueue(BatchingOptions(max_batch=2, max_delay_s=0.5), axes)
    queue.push(make_entry(request(1, {"input": np.ones((1, 4), np.float32)}, arrival=10.0), axes))
    assert queue.due(now=10.1) == 10.5
    queue.push(make_entry(request(2, {"input": np.ones((1, 4), np.float32)}, arrival=10.2), axes))
    assert queue.due(now=10.2) == 10.2


def test_packed_rows_do_not_wait_for_company_when_their_tokens_fill_a_batch() -> None:
    queue = ModelQueue(BatchingOptions(max_batch=16, max_tokens=112, max_delay_s=0.5), packed_axes())
    queue.push(make_entry(request(1, token_rows([5, 70]), (5, 70), arrival=10.0), queue.axes))
    assert queue.due(now=10.1) == 10.5
    queue.push(make_entry(request(2, token_rows([37]), (37,), arrival=10.2), queue.axes))
    assert queue.due(now=10.2) == 10.2
    batch = queue.take(10.2)
    assert batch is not None and (batch.rows, batch.tokens) == (3, 112)


def test_a_full_group_does_not_wait_behind_one_that_waits_for_company() -> None:
    axes = find_axes(*infos("encoder"))
    queue = ModelQueue(BatchingOptions(max_batch=2, max_delay_s=0.5), axes)
    queue.push(make_entry(request(1, token_rows([100]), (100,), arrival=10.0), axes))
    queue.push(make_entry(request(2, token_rows([5]), (5,), arrival=10.1), axes))
    queue.push(make_entry(request(3, token_rows([6]), (6,), arrival=10.2), axes))
    assert queue.due(now=10.2) == 10.2
    batch = queue.take(10.2)
    assert batch is not None and [part.entry.request.id for part in batch.parts] == [2, 3]
    assert queue.due(now=10.2) == 10.5
    batch = queue.take(10.5)
    assert batch is not None and [part.entry.request.id for part in batch.parts] == [1]


def test_cancelled_requests_are_no_company() -> None:
    axes = find_axes(*infos("identity"))
    queue = ModelQueue(BatchingOptions(max_batch=2, max_delay_s=0.5), axes)
    for number in (1, 2):
        row = {"input": np.ones((1, 4), np.float32)}
        queue.push(make_entry(request(number, row, arrival=10.0 + number / 10), axes))
    queue.remove(2)
    assert queue.due(now=10.3) == pytest.approx(10.6)


def test_the_request_that_waited_longest_says_when_a_batch_starts() -> None:
    axes = find_axes(*infos("identity"))
    queue = ModelQueue(BatchingOptions(max_batch=4, max_delay_s=0.5), axes)
    row = {"input": np.ones((1, 4), np.float32)}
    queue.push(make_entry(request(1, row, priority=50, arrival=10.0), axes))
    queue.push(make_entry(request(2, row, priority=1, arrival=10.4), axes))
    assert queue.due(now=10.4) == 10.5
    batch = queue.take(10.5)
    assert batch is not None and [part.entry.request.id for part in batch.parts] == [2, 1]


def test_capacity_is_in_tokens_for_sequence_models_and_in_rows_for_others() -> None:
    options = BatchingOptions(max_batch=3, max_tokens=100, queue_batches=2)
    assert capacity(options, find_axes(*infos("encoder"))) == 200
    assert capacity(options, find_axes(*infos("identity"))) == 6


def test_the_work_for_a_request_grows_with_its_rows_only() -> None:
    """Lengths are read a few times each, however many batches the rows are spread over."""

    class Counted(tuple[int, ...]):
        reads = 0

        def __iter__(self) -> Any:
            for value in super().__iter__():
                Counted.reads += 1
                yield value

        def __getitem__(self, index: Any) -> Any:
            Counted.reads += 1
            return super().__getitem__(index)

    rows = 4000
    axes = find_axes(*infos("encoder"))
    queue = ModelQueue(BatchingOptions(max_batch=8), axes)
    lengths = Counted([2] * (rows - 1) + [1])
    queue.push(make_entry(request(1, token_rows([2] * rows), lengths), axes))
    batches = 0
    while (batch := queue.take(0.0)) is not None:
        batches += 1
        shape = (batch.rows, batch.width, HIDDEN)
        assemble(batch)
        finished = scatter(batch, {"last_hidden_state": np.ones(shape, np.float32)}, axes)
    assert batches == rows // 8
    assert finished[0].outputs["last_hidden_state"].shape == (rows, 2, HIDDEN)
    assert queue.cost == 0
    assert queue.remove(1) is not None
    assert queue.cost == 0
    assert Counted.reads < 20 * rows
