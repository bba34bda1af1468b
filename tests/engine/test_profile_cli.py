"""`python -m engine profile`: one truth as a table, as JSON and as a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine.cli import main
from engine.cli.common import step_text
from engine.cli.trace import chrome_trace
from engine.specs import DeviceInfo, ProfileRow
from service.routes.protocol_documents import PROFILE_ANSWER

DEVICE = DeviceInfo("cpu", "A CPU", "avx2", 2, 1e9, 1e8, 1 << 20, 1e9)


@pytest.fixture
def product(tmp_path: Path) -> str:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 64]) for name in "xy")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Softmax", ["h"], ["y"])]
    w = numpy_helper.from_array(np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32), "w")
    graph = helper.make_graph(nodes, "product", [x], [y], [w])
    path = tmp_path / "product.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    path.write_bytes(proto.SerializeToString())
    return str(path)


def profile(product: str, *options: str) -> int:
    return main(["profile", product, "--device", "cpu", "--runs", "3", "--size", "n=8", *options])


def test_json_has_the_fields_of_the_service(product: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile(product, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["sizes"] == {"n": 8}
    assert document["run_seconds"] > 0
    schema: Any = PROFILE_ANSWER[200]["content"]["application/json"]["schema"]["properties"]
    steps, device = schema["steps"]["items"]["properties"], schema["device"]["properties"]
    for step in document["steps"]:
        assert set(step) == set(steps) - {"result"}
        assert step["calls"] == 3 and step["seconds"] > 0
        assert step["flops_per_second"] == pytest.approx(step["flops"] / step["seconds"])
    assert set(document["device"]) >= set(device)
    assert document["steps"][0]["flops"] == 2 * 8 * 64 * 64


def test_the_table_adds_up_by_kernel(product: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile(product) == 0
    steps, kernels, summary = capsys.readouterr().out.strip().split("\n\n")
    assert [line.split()[1] for line in steps.splitlines()[1:]] == ["gemm", "softmax"]
    shares = [int(line.split()[4].rstrip("%")) for line in kernels.splitlines()[1:]]
    assert {line.split()[0] for line in kernels.splitlines()[1:]} == {"gemm", "softmax"}
    assert 99 <= sum(shares) <= 101 and shares == sorted(shares, reverse=True)
    assert "in 2 steps" in summary and "(n=8)" in summary


def test_the_trace_is_the_profile(product: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    assert profile(product, "--json", "--trace", str(path)) == 0
    document, trace = json.loads(capsys.readouterr().out), json.loads(path.read_text())
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [event["name"] for event in slices] == ["run", *(step["step"] for step in document["steps"])]
    times = [step["seconds"] * 1e6 for step in document["steps"]]
    assert [event["dur"] for event in slices[1:]] == pytest.approx(times)
    assert slices[0]["dur"] == pytest.approx(document["run_seconds"] * 1e6)


def test_slices_of_a_trace_lie_end_to_end_and_carry_their_rates() -> None:
    rows = [
        ProfileRow("a", "conv", "Conv", 5, 2e-3, 10**6, 10**5, 0, 0.5),
        ProfileRow("b", "copy", "Pad", 5, 1e-3, 0, 10**4, 0, 0.1),
    ]
    events = chrome_trace("m", DEVICE, rows, 4e-3)["traceEvents"]
    steps = [event for event in events if event["ph"] == "X" and event["name"] != "run"]
    assert [(event["ts"], event["dur"]) for event in steps] == [(0, pytest.approx(2000)), (pytest.approx(2000), 1000)]
    assert steps[0]["args"]["FLOP/s"] == pytest.approx(5e8) and steps[0]["args"]["roofline"] == 0.5
    counters = [(event["name"], event["ts"], event["args"][event["name"]]) for event in events if event["ph"] == "C"]
    assert counters[-2:] == [("FLOP/s", pytest.approx(3000), 0), ("B/s", pytest.approx(3000), 0)]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {event["tid"] for event in events if event["ph"] == "X"} == set(tracks)
    assert all({"ph", "pid", "tid", "name"} <= set(event) for event in events)


def test_a_trace_that_cannot_be_written_is_named(product: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile(product, "--trace", "/nowhere/trace.json") == 2
    assert "/nowhere/trace.json" in capsys.readouterr().err


def test_a_long_name_of_a_step_keeps_what_it_differs_in() -> None:
    """Of a step that is a convolution with what is fused into it, the convolution's name, which comes first."""
    name = "/blocks/1/expand/Conv + /blocks/1/bn0/BatchNormalization + /blocks/1/bn0/Clip"
    assert step_text(name) == "/blocks/1/expand/Conv + /blocks/1/bn0/BatchNorm…"
    assert step_text("/fc/Gemm") == "/fc/Gemm" and len(step_text(name, 40)) == 40
