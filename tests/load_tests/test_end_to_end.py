"""What the comparison with the engine alone computes, and its baselines on models of a few operations."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from load_tests.baselines import Alone, Turn
from load_tests.end_to_end import cpu_of_request, totals
from load_tests.http_client import Answer, Results
from load_tests.payloads import PIXELS, photos
from load_tests.turns import ratio_of_turns
from load_tests.workloads import pixel_tensors

FIXTURES = Path(__file__).parent.parent / "fixtures"


def doubling_model(folder: Path, *sizes: int | str) -> Path:
    """A model folder: twice its input, of these sizes."""
    place = folder / "1"
    place.mkdir()
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name in ("input", "output")]
    node = helper.make_node("Add", ["input", "input"], ["output"])
    graph = helper.make_graph([node], "doubling", infos[:1], infos[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, place / "model.onnx")
    return folder


def turn(rate: float, seconds: float = 2.0) -> Turn:
    return Turn(round(rate * seconds), seconds, server_cpu=1.0, client_cpu=0.5)


def test_a_ratio_is_that_of_turns_beside_each_other() -> None:
    """A machine that gets slower by half, and one turn that was disturbed, change nothing."""
    ours, others = [turn(90), turn(45), turn(10)], [turn(100), turn(50), turn(50)]
    assert ratio_of_turns(ours, others) == pytest.approx(0.9)


def test_totals_weigh_turns_by_their_length_and_count_cpu_a_request() -> None:
    row = totals([turn(100, 1.0), turn(40, 3.0)])
    assert row == {"requests_per_s": 55.0, "server_cpu_ms": 9.09, "client_cpu_ms": 4.55}
    assert cpu_of_request([turn(100, 1.0), turn(40, 3.0)]) == pytest.approx(3.0 / 220)
    assert "client_cpu_ms" not in totals([Turn(10, 1.0, 1.0)])


def test_results_of_several_turns_add_up() -> None:
    first = Results(seconds=1.0, latencies=[0.1], statuses=Counter({200: 1, 503: 2}), problems=["a"], renewed=1)
    first.extend(Results(seconds=2.0, latencies=[0.2, 0.3], statuses=Counter({200: 2}), second_tries=3))
    assert (first.seconds, first.latencies, first.problems) == (3.0, [0.1, 0.2, 0.3], ["a"])
    assert first.statuses == {200: 3, 503: 2}
    assert (first.renewed, first.second_tries) == (1, 3)


def test_the_engine_alone_runs_the_sizes_that_it_is_given_as_often(tmp_path: Path) -> None:
    with closing(Alone(doubling_model(tmp_path, "batch", "tokens"))) as alone:
        sizes = {(("batch", 3), ("tokens", 7)): 2, (("batch", 5), ("tokens", 4)): 1}
        done = alone.engine_rows(0.2, sizes)
        assert done.requests > 100
        assert 0.2 <= done.seconds < 5
        assert done.server_cpu > 0
        plans = {tuple(plan.sizes.items()): plan.rows[0].calls for plan in alone._model.plan_profiles()}
    runs = {key: plans[key] - 1 for key in sizes}  # one to make the plan
    assert sum(dict(key)["batch"] * count for key, count in runs.items()) == done.requests
    short, long = runs.values()
    assert abs(short - 2 * long) <= 2


def test_the_engine_alone_runs_as_many_packed_tokens_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    shutil.copy(FIXTURES / "bert_dynamo.onnx", tmp_path / "1" / "model.onnx")
    with closing(Alone(tmp_path)) as alone:
        size = alone._model.packed_size
        assert size is not None
        sizes = (("batch", 3), ("sequence", 12), (size, 16))
        done = alone.engine_rows(0.1, {sizes: 1})
        (plan,) = alone._model.plan_profiles()
    assert tuple(plan.sizes.items()) == sizes
    assert done.requests == 3 * (plan.rows[0].calls - 1) > 0


def test_packed_rows_of_the_engine_alone_are_as_long_as_those_that_are_sent(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    shutil.copy(FIXTURES / "bert_dynamo.onnx", tmp_path / "1" / "model.onnx")
    with closing(Alone(tmp_path, [2, 3, 11])) as alone:
        size, mask = alone._model.packed_size, alone._model.packed_mask
        assert size is not None
        assert mask is not None

        def lengths(width: int, tokens: int) -> list[int]:
            feeds = alone._feeds({"batch": 3, "sequence": width, size: tokens})
            assert feeds[mask].shape == (3, width)
            found: list[int] = np.sort(feeds[mask].sum(axis=1)).tolist()
            return found

        assert lengths(16, 16) in ([2, 2, 11], [2, 3, 11])
        assert lengths(16, 24) in ([3, 3, 11], [2, 11, 11])
        assert lengths(8, 16) == [3, 3, 3]
        assert lengths(16, 8) == [2, 3, 3]  # as none are that are this wide and have so few tokens


def test_photos_are_decoded_and_run_in_batches(tmp_path: Path) -> None:
    with closing(Alone(doubling_model(tmp_path, "batch", *PIXELS))) as alone:
        done = alone.decoded_photos(0.2, 4)
        (plan,) = alone._model.plan_profiles()
    assert plan.sizes == {"batch": 4}
    assert done.requests == 4 * (plan.rows[0].calls - 1)
    assert done.requests > 0


def test_an_answer_to_pixels_is_right_where_its_label_is_the_highest() -> None:
    labels = ["cat", "espresso", "tripod"]
    known = {photo.label for photo in photos()} & set(labels)
    make = pixel_tensors("m", "x", labels)
    found = set()
    for seed in range(60):
        exchange = make(random.Random(seed))
        head, _, body = exchange.request.partition(b"\r\n\r\n")
        assert int(head.lower().split(b"content-length: ")[-1].split()[0]) > 0
        assert len(body) > 4 * np.prod(PIXELS)
        for index in range(3):
            scores = np.eye(3, dtype=np.float32)[index].tobytes()
            answer = Answer(200, {b"inference-header-content-length": b"2"}, b"{}" + scores)
            problem = exchange.problem(answer)
            if problem is None:
                found.add(labels[index])
            else:
                assert "instead of" in problem
        assert exchange.problem(Answer(200, {b"inference-header-content-length": b"2"}, b"{}")) == "0 scores"
    assert known <= found
