"""Open Inference Protocol v2 through the unmodified public client, and by hand where the client cannot."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from service.client_memory import ClientMemory
from service.codecs.tensors import Source, parse_infer
from service.errors import InvalidRequest
from service.workers.messages import TensorInfo
from tests.service.conftest import Running, Start, add_model, error_of
from tests.service.fakes import HIDDEN, KINDS

SOURCE = Source(1 << 24, ClientMemory(()))
VALUES = np.array([[1.5, -2, 3, 4], [5, 6, 7, 8]], np.float32)


@pytest.fixture
def client(shared: Running) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(shared.url.removeprefix("http://"))


def tensor(name: str, array: np.ndarray, datatype: str, binary: bool) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("identity")
    assert client.is_model_ready("identity", "1")
    assert not client.is_model_ready("identity", "2")
    assert not client.is_model_ready("nobody")
    server = client.get_server_metadata()
    assert server["name"] == "tilewave"
    assert server["extensions"] == [
        "binary_tensor_data",
        "classification",
        "model_configuration",
        "model_repository",
        "model_repository(unload_dependents)",
        "statistics",
    ]
    model = client.get_model_metadata("encoder")
    assert model["versions"] == ["1"]
    assert model["inputs"][0] == {"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}
    assert model["outputs"] == [{"name": "last_hidden_state", "datatype": "FP32", "shape": [-1, -1, HIDDEN]}]


def test_configuration(client: triton.InferenceServerClient, start: Start, tmp_path: Path) -> None:
    config = client.get_model_config("colours")
    assert config["max_batch_size"] == 16
    assert config["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": [3, 8, 8]}]
    assert config["dynamic_batching"] == {"max_queue_delay_microseconds": 0}
    assert config["model_transaction_policy"] == {"decoupled": False}
    add_model(tmp_path, "fixed", "fixed")
    add_model(tmp_path, "slow", "identity", "[batching]\nmax_batch = 4\nmax_delay_ms = 2.5\n")
    other = triton.InferenceServerClient(start(tmp_path).url.removeprefix("http://"))
    config = other.get_model_config("fixed")
    assert config["max_batch_size"] == 0
    assert config["input"][0]["dims"] == [2, 4]
    assert "dynamic_batching" not in config
    config = other.get_model_config("slow")
    assert config["max_batch_size"] == 4
    assert config["dynamic_batching"] == {"max_queue_delay_microseconds": 2500}


@pytest.mark.parametrize("binary_input", [False, True], ids=["JSON in", "binary in"])
@pytest.mark.parametrize("binary_output", [False, True, None], ids=["JSON out", "binary out", "default out"])
def test_infer(client: triton.InferenceServerClient, binary_input: bool, binary_output: bool | None) -> None:
    wanted = None if binary_output is None else [triton.InferRequestedOutput("output", binary_data=binary_output)]
    inputs = [tensor("input", VALUES, "FP32", binary_input)]
    result = client.infer("identity", inputs, outputs=wanted, request_id="r-1", model_version="1")
    np.testing.assert_array_equal(result.as_numpy("output"), VALUES)
    answer = result.get_response()
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("identity", "1", "r-1")
    (output,) = answer["outputs"]
    assert (output["datatype"], output["shape"]) == ("FP32", [2, 4])
    assert ("parameters" in output) == (binary_output is not False)


def test_infer_with_request_compression(client: triton.InferenceServerClient) -> None:
    for algorithm in ("gzip", "deflate"):
        inputs = [tensor("input", VALUES, "FP32", True)]
        result = client.infer("identity", inputs, request_compression_algorithm=algorithm)
        np.testing.assert_array_equal(result.as_numpy("output"), VALUES)


@pytest.mark.parametrize(
    ("kind", "array", "datatype"),
    [
        ("half", np.array([[1.5, 2]], np.float16), "FP16"),
        ("int32", np.array([[-(2**31), 2**31 - 1]], np.int32), "INT32"),
        ("bool", np.array([[True, False]]), "BOOL"),
        ("strings", np.array([["fünf".encode(), b""]], object), "BYTES"),
    ],
)
def test_datatypes(start: Start, tmp_path: Path, kind: str, array: np.ndarray, datatype: str) -> None:
    add_model(tmp_path, "m", kind)
    server = start(tmp_path)
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    expected = (array / 2 if kind == "half" else array).tolist()
    result = client.infer("m", [tensor("input", array, datatype, True)])
    assert result.as_numpy("output").tolist() == expected
    if datatype == "FP16":
        with pytest.raises(InferenceServerException, match="binary data only"):
            client.infer(
                "m", [tensor("input", array, datatype, True)], outputs=[triton.InferRequestedOutput("output", False)]
            )
        return
    result = client.infer(
        "m", [tensor("input", array, datatype, False)], outputs=[triton.InferRequestedOutput("output", False)]
    )
    assert result.as_numpy("output").tolist() == ([["fünf", ""]] if kind == "strings" else expected)


def test_json_says_how_many_values_it_has_no_number_for(shared: Running) -> None:
    client = triton.InferenceServerClient(shared.url.removeprefix("http://"))
    for row, count in (([np.nan, 1, np.inf, -np.inf], 3), ([1, 2, 3, 4], 0)):
        sent = np.array([row], np.float32)
        inputs = [tensor("input", sent, "FP32", True)]
        result = client.infer("identity", inputs, outputs=[triton.InferRequestedOutput("output", False)])
        told = result.get_output("output")
        assert told.get("parameters") == ({"non_finite": count} if count else None)
        assert told["data"] == [value if np.isfinite(value) else None for value in row]
        if count:
            assert np.array_equal(np.isnan(result.as_numpy("output")), ~np.isfinite(sent))
        result = client.infer("identity", inputs, outputs=[triton.InferRequestedOutput("output", True)])
        assert result.as_numpy("output").tobytes() == sent.tobytes()
        assert "non_finite" not in result.get_output("output")["parameters"]


def test_a_raw_body_is_the_one_input(shared: Running) -> None:
    response = shared.client.post(
        "/v2/models/identity/infer", content=VALUES.tobytes(), headers={"Inference-Header-Content-Length": "0"}
    )
    size = int(response.headers["inference-header-content-length"])
    document = json.loads(response.content[:size])
    assert document["outputs"][0]["shape"] == [2, 4]
    np.testing.assert_array_equal(np.frombuffer(response.content[size:], "<f4").reshape(2, 4), VALUES)
    response = shared.client.post(
        "/v2/models/encoder/infer", content=b"1234", headers={"Inference-Header-Content-Length": "0"}
    )
    assert response.status_code == 400
    assert "one input" in error_of(response)


def test_nested_data_is_read_row_major(shared: Running) -> None:
    body = {"inputs": [{"name": "input", "shape": [2, 4], "datatype": "FP32", "data": VALUES.tolist()}]}
    answer = shared.client.post("/v2/models/identity/infer", json=body).json()
    assert answer["outputs"][0]["data"] == VALUES.ravel().tolist()
    assert "id" not in answer


def test_statistics(server: Running) -> None:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    for rows in (1, 2, 2):
        client.infer("identity", [tensor("input", VALUES[:rows], "FP32", True)])
    with pytest.raises(InferenceServerException):
        client.infer("identity", [tensor("input", VALUES[:, :3], "FP32", True)])
    (stats,) = client.get_inference_statistics("identity")["model_stats"]
    assert (stats["name"], stats["version"]) == ("identity", "1")
    assert (stats["inference_count"], stats["execution_count"]) == (5, 3)
    assert stats["last_inference"] > 1_600_000_000_000
    timed = stats["inference_stats"]
    assert set(timed) == {
        "success",
        "fail",
        "queue",
        "compute_input",
        "compute_infer",
        "compute_output",
        "cache_hit",
        "cache_miss",
    }
    assert (timed["success"]["count"], timed["fail"]["count"]) == (3, 1)
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    assert 0 < sum(timed[part]["ns"] for part in parts) <= timed["success"]["ns"]
    assert {entry["batch_size"]: entry["compute_infer"]["count"] for entry in stats["batch_stats"]} == {1: 1, 2: 2}
    assert {s["name"] for s in client.get_inference_statistics()["model_stats"]} == {"colours", "encoder", "identity"}
    assert server.client.get("/v2/models/identity/versions/1/stats").json()["model_stats"] == [stats]


def test_repository_index(start: Start, repository: Path) -> None:
    (repository / "encoder" / "1" / "model.onnx").write_bytes(b"junk")
    server = start(repository)
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    index = {entry["name"]: entry for entry in client.get_model_repository_index()}
    assert index["identity"]["state"] == "READY"
    assert index["encoder"]["state"] == "UNAVAILABLE"
    assert "no ONNX model" in index["encoder"]["reason"]
    ready = server.client.post("/v2/repository/index", json={"ready": True}).json()
    assert {entry["name"] for entry in ready} == {"colours", "identity"}
    assert server.client.post("/v2/repository/index", json={"ready": 3}).status_code == 400


def test_versions(start: Start, repository: Path) -> None:
    add_model(repository, "identity", "half", version=3)
    server = start(repository)
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.get_model_metadata("identity")["versions"] == ["1", "3"]
    assert client.get_model_metadata("identity")["inputs"][0]["datatype"] == "FP16"
    assert client.get_model_metadata("identity", "1")["inputs"][0]["datatype"] == "FP32"
    result = client.infer("identity", [tensor("input", VALUES, "FP32", True)], model_version="1")
    assert result.get_response()["model_version"] == "1"
    with pytest.raises(InferenceServerException, match="no version '2'"):
        client.get_model_metadata("identity", "2")


def test_deadline_and_priority_come_as_parameters(server: Running) -> None:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    server.engine.gate.clear()
    inputs = [tensor("input", VALUES, "FP32", True)]
    with pytest.raises(InferenceServerException) as late:
        client.infer("identity", inputs, timeout=20_000, priority=1)
    assert late.value.status() == "504"
    server.engine.gate.set()
    client.infer("identity", inputs, priority=1, timeout=10_000_000)


def infer_body(**changes: Any) -> dict[str, Any]:
    good = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    merged = {key: value for key, value in {**good, **changes}.items() if value is not ...}
    return {"inputs": [merged]}


BAD: list[tuple[Any, str]] = [
    ({}, "'inputs'"),
    ({"inputs": {}}, "'inputs'"),
    ({"inputs": []}, "'input' is missing"),
    ({"inputs": [3]}, "'name'"),
    ({"inputs": [{"name": 3}]}, "'name'"),
    (infer_body(name="x"), "no input 'x'"),
    ({"inputs": infer_body()["inputs"] * 2}, "twice"),
    (infer_body(datatype="INT64"), "the model takes FP32"),
    (infer_body(datatype=None), "the model takes FP32"),
    (infer_body(shape=[4]), "shape [4]"),
    (infer_body(shape=[1, 5]), "shape [1, 5]"),
    (infer_body(shape=[-1, 4]), "'shape' is [-1, 4]; send a list of integers that are not negative"),
    (infer_body(shape=[1.0, 4]), "not negative"),
    (infer_body(shape=[True, 4]), "not negative"),
    (infer_body(shape="1"), "'shape'"),
    (infer_body(shape=...), "'shape'"),
    (infer_body(shape=[0, 4], data=[]), "holds nothing"),
    (infer_body(shape=[2, 4]), "4 elements"),
    (infer_body(shape=[1 << 40, 4]), "4 elements"),
    (infer_body(data=...), "no 'data'"),
    (infer_body(data=3), "input 'input': 'data' is 3; send a list"),
    (infer_body(data=[1, 2, 3]), "3 elements"),
    (infer_body(data=[1, 2, 3, "4"]), "input 'input': data[3] is the string '4'; FP32 takes numbers"),
    (infer_body(data=[1, 2, 3, None]), "input 'input': data[3] is null; FP32 takes numbers"),
    (infer_body(data=[[1, 2, True, 3]]), "input 'input': data[0][2] is true; FP32 takes numbers"),
    (infer_body(data=[1, 2, 3, -1e39]), "data[3] is -1e+39; FP32 takes numbers from -3.4e+38 to 3.4e+38"),
    (infer_body(data=[1, 2, {}, 3]), "data[2] is an object"),
    (infer_body(data=[[1, 2], [3, 4]]), "data has 2 entries, but the shape [1, 4] has 1 there"),
    (infer_body(data=[[1, 2, 3, [4]]]), "data[0][3] is a list, but the shape [1, 4] has no more axes"),
    (infer_body(data=[[[1], [2], [3], [4]]]), "data[0][0] is a list, but the shape [1, 4] has no more axes"),
    (infer_body(data=[[1, 2, 3]]), "data[0] has 3 entries, but the shape [1, 4] has 4 there"),
    (infer_body(shape=[2, 4], data=[[1, 2, 3], [4, 5, 6, 7, 8]]), "data[0] has 3 entries"),
    (infer_body(shape=[2, 4], data=[[1, 2, 3, 4], 5, 6, 7, 8]), "data has 5 entries, but the shape [2, 4] has 2"),
    (infer_body(shape=[2, 4], data=[[1, 2, 3, 4], 5]), "data[1] is 5, but the shape [2, 4] has 4 there"),
    (infer_body(shape=[2, 4], data=[[], []]), "data[0] has 0 entries"),
    (infer_body(parameters=3), "'parameters'"),
    (infer_body(parameters={"binary_data_size": 4}), "both"),
    (infer_body(data=..., parameters={"binary_data_size": 16}), "0 bytes are left"),
    (infer_body(data=..., parameters={"binary_data_size": -1}), "unsigned"),
    (infer_body(parameters={"shared_memory_region": "x"}), "no 'shared_memory_byte_size'"),
    (infer_body(data=..., parameters={"shared_memory_region": "x", "shared_memory_byte_size": 4}), "memory is off"),
    (infer_body(parameters={"shared_memory_region": "x", "shared_memory_byte_size": 4}), "both"),
    ({**infer_body(), "parameters": []}, "'parameters'"),
    ({**infer_body(), "parameters": {"sequence_id": 3}}, "not supported"),
    ({**infer_body(), "parameters": {"timeout": "1"}}, "'timeout' is the string '1'"),
    ({**infer_body(), "parameters": {"timeout": 0.5}}, "'timeout' is 0.5"),
    ({**infer_body(), "parameters": {"priority": -1}}, "'priority'"),
    ({**infer_body(), "parameters": {"binary_data_output": 1}}, "'binary_data_output'"),
    ({**infer_body(), "id": 3}, "'id'"),
    ({**infer_body(), "outputs": 3}, "'outputs'"),
    ({**infer_body(), "outputs": [{}]}, "no output"),
    ({**infer_body(), "outputs": [{"name": "x"}]}, "no output 'x'"),
    ({**infer_body(), "outputs": [{"name": "output"}] * 2}, "twice"),
    ({**infer_body(), "outputs": [{"name": "output", "parameters": {"binary_data": 1}}]}, "'binary_data'"),
    ({**infer_body(), "outputs": [{"name": "output", "parameters": {"classification": 0}}]}, "ask for 1 class or more"),
]


@pytest.mark.parametrize(("body", "words"), BAD, ids=[json.dumps(body)[:60] for body, _ in BAD])
def test_bad_requests(shared: Running, body: Any, words: str) -> None:
    response = shared.client.post("/v2/models/identity/infer", json=body)
    assert response.status_code == 400
    assert words in error_of(response)


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "99999", "", "0x10", "9" * 40])
def test_bad_header_length(shared: Running, length: str) -> None:
    body = json.dumps(infer_body()).encode()
    response = shared.client.post(
        "/v2/models/identity/infer", content=body, headers={"Inference-Header-Content-Length": length}
    )
    assert response.status_code == 400
    assert error_of(response)


@pytest.mark.parametrize(
    ("size", "data", "words"),
    [
        (16, b"x" * 15, "15 bytes are left"),
        (15, b"x" * 15, "no whole number"),
        (12, b"x" * 12, "3 elements"),
        (16, b"x" * 17, "17 bytes of binary data"),
        (1 << 62, b"x" * 16, "bytes are left"),
    ],
)
def test_bad_binary_sizes(shared: Running, size: int, data: bytes, words: str) -> None:
    header = json.dumps(infer_body(data=..., parameters={"binary_data_size": size})).encode()
    response = shared.client.post(
        "/v2/models/identity/infer",
        content=header + data,
        headers={"Inference-Header-Content-Length": str(len(header))},
    )
    assert response.status_code == 400
    assert words in error_of(response)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x05\x00\x00\x00abc", "longer than the data"),
        (b"\x01\x00", "longer than the data"),
        (struct.pack("<I", 2**32 - 1), "longer than the data"),
        (b"", "0 elements"),
        (b"\x02\x00\x00\x00a\xff", "element 0 is not UTF-8 (invalid start byte at byte 1)"),
    ],
)
def test_bad_strings(data: bytes, words: str) -> None:
    spec = TensorInfo("s", np.dtype(object), (1,))
    tensor_ = {"name": "s", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(data)}}
    header = json.dumps({"inputs": [tensor_]}).encode()
    with pytest.raises(InvalidRequest) as refused:
        parse_infer(header + data, str(len(header)).encode(), [spec], [], SOURCE)
    assert f"input 's'{':' if words[0] != '0' else ' has'} " in str(refused.value)
    assert words in str(refused.value)


def test_inputs_that_disagree_about_a_dim(shared: Running) -> None:
    inputs = [
        {"name": "input_ids", "shape": [1, 3], "datatype": "INT64", "data": [1, 2, 3]},
        {"name": "attention_mask", "shape": [1, 2], "datatype": "INT64", "data": [1, 1]},
    ]
    response = shared.client.post("/v2/models/encoder/infer", json={"inputs": inputs})
    assert response.status_code == 400
    assert "dim 'sequence' is 3 in input 'input_ids' but 2" in error_of(response)


@pytest.mark.parametrize("value", [1.0, 1.5, 2**31, -(2**31) - 1, 2**64, True, "1", None])
def test_integers_are_integers_in_range(start: Start, tmp_path: Path, value: Any) -> None:
    add_model(tmp_path, "m", "int32")
    body = {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "INT32", "data": [0, value]}]}
    response = start(tmp_path).client.post("/v2/models/m/infer", json=body)
    assert response.status_code == 400
    error = error_of(response)
    assert error.startswith("input 'input': data[1] is ")
    assert error.endswith("; INT32 takes integers from -2147483648 to 2147483647")


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "9" * 5000, "1" * 400 + "e9"]
)
@pytest.mark.parametrize(("kind", "datatype"), [("int32", "INT32"), ("identity", "FP32"), ("bool", "BOOL")])
@pytest.mark.parametrize("binary_header", [False, True], ids=["JSON", "JSON before binary data"])
def test_numbers_that_json_does_not_have_are_named_where_they_are(
    start: Start, tmp_path: Path, value: str, kind: str, datatype: str, binary_header: bool
) -> None:
    add_model(tmp_path, "m", kind)
    columns = KINDS[kind][0][0].shape[1]
    rest = ", ".join(["true" if kind == "bool" else "1"] * (int(columns) - 1))
    data = f"[[{rest}, {value}]]"
    body = f'{{"inputs": [{{"name": "input", "shape": [1, {columns}], "datatype": "{datatype}", "data": {data}}}]}}'
    headers = {"inference-header-content-length": str(len(body))} if binary_header else {}
    response = start(tmp_path).client.post("/v2/models/m/infer", content=body, headers=headers)
    assert response.status_code == 400
    said = value if len(value) <= 40 else f"{value[:40]}…"
    assert f"input 'input': data[0][{int(columns) - 1}] is {said}; {datatype} takes " in error_of(response)


def test_numbers_that_json_does_not_have_are_refused_where_nobody_looks_at_them(shared: Running) -> None:
    body = json.dumps({**infer_body(), "note": float("nan")})
    response = shared.client.post("/v2/models/identity/infer", content=body)
    assert response.status_code == 400
    assert "neither NaN nor infinity" in error_of(response)


@pytest.mark.parametrize(
    ("dtype", "value", "expected"),
    [
        ("uint8", 300, "data[1] is 300; UINT8 takes integers from 0 to 255"),
        ("uint8", -1, "data[1] is -1; UINT8 takes integers from 0 to 255"),
        ("int8", 128, "data[1] is 128; INT8 takes integers from -128 to 127"),
        ("uint64", -5, "data[1] is -5; UINT64 takes integers from 0 to 18446744073709551615"),
        ("int64", 2**63, "data[1] is 9223372036854775808; INT64 takes integers from -9223372036854775808 to"),
    ],
)
def test_integers_out_of_range_are_named(dtype: str, value: int, expected: str) -> None:
    spec = TensorInfo("x", np.dtype(dtype), (2,))
    body = {"inputs": [{"name": "x", "shape": [2], "datatype": dtype.upper(), "data": [0, value]}]}
    with pytest.raises(InvalidRequest) as refused:
        parse_infer(json.dumps(body).encode(), None, [spec], [], SOURCE)
    assert f"input 'x': {expected}" in str(refused.value)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3), (1,), (2, 2, 2, 2)])
def test_nested_and_flat_data_are_the_same(shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    spec = TensorInfo("x", np.dtype("int64"), shape)
    for data in (array.tolist(), array.ravel().tolist()):
        body = {"inputs": [{"name": "x", "shape": list(shape), "datatype": "INT64", "data": data}]}
        parsed = parse_infer(json.dumps(body).encode(), None, [spec], [], SOURCE)
        np.testing.assert_array_equal(parsed.inputs[0][1], array)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "shape", "datatype", "data", "parameters", "inputs", "id"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(document=JSON, inputs=JSON)
def test_any_json_is_parsed_or_refused(document: Any, inputs: Any) -> None:
    spec = TensorInfo("input", np.dtype("float32"), ("n", 4))
    if isinstance(document, dict):
        document["inputs"] = [inputs] if isinstance(inputs, dict) else inputs
        if isinstance(inputs, dict):
            inputs["name"] = "input"
    try:
        parsed = parse_infer(json.dumps(document).encode(), None, [spec], [spec], SOURCE)
    except InvalidRequest:
        return
    assert parsed.inputs[0][1].dtype == np.float32


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 100), binary=st.booleans())
def test_any_number_of_rows_comes_back(shared: Running, rows: int, binary: bool) -> None:
    """Also more rows than one batch holds."""
    client = triton.InferenceServerClient(shared.url.removeprefix("http://"))
    array = np.random.default_rng(rows).standard_normal((rows, 4)).astype(np.float32)
    result = client.infer("identity", [tensor("input", array, "FP32", binary)])
    np.testing.assert_array_equal(result.as_numpy("output"), array)
