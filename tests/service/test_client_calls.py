"""Every call that `tritonclient[http]` offers for one-shot inference, through its sync and its asyncio client."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.service.conftest import Running, Starter, add_model, common_models, error_of

VALUES = np.array([[1.5, -2, 3, 4], [5, 6, 7, 8]], np.float32)
ARRAYS = {
    "half": np.array([[1.5, -3]], np.float16),
    "int32": np.array([[-(2**31), 7], [3, 2**31 - 1]], np.int32),
    "bool": np.array([[True, False]]),
    "strings": np.array([["ä", ""], ["long " * 100, "d"]], object),
}
"""By model, what it takes. It gives back the same, but for `half`, which halves it."""

NOT_OURS = {
    "close",
    "update_trace_settings",
    "get_trace_settings",
    "update_log_settings",
    "get_log_settings",
    "get_cuda_shared_memory_status",
    "register_cuda_shared_memory",
    "unregister_cuda_shared_memory",
}
"""Calls for what `extensions` does not list, and those that do no request."""


@dataclass
class Caller:
    """One of the two clients, called the same way. `called` are the names of the calls made."""

    url: str
    kind: str
    called: set[str]

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.called.add(name)
            if self.kind == "sync":
                with triton.InferenceServerClient(self.url) as client:
                    return getattr(client, name)(*args, **kwargs)
            return asyncio.run(self._call(name, args, kwargs))

        return call

    async def _call(self, name: str, args: Any, kwargs: Any) -> Any:
        async with triton_aio.InferenceServerClient(self.url) as client:
            return await getattr(client, name)(*args, **kwargs)


CALLED: dict[str, set[str]] = {"sync": set(), "asyncio": set()}


@pytest.fixture(scope="module", params=["never", "always"], ids=["same process", "own process"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    starter = Starter()
    root = common_models(tmp_path_factory.mktemp("served") / "models")
    add_model(root, "identity", "identity", version=2)
    for kind in ARRAYS:
        add_model(root, kind, kind)
    yield starter(root, engine_process=request.param, shared_memory_prefixes="/tilewave_test_")
    starter.stop()


@pytest.fixture(params=["sync", "asyncio"])
def client(request: pytest.FixtureRequest, served: Running) -> Caller:
    return Caller(served.url.removeprefix("http://"), request.param, CALLED[request.param])


def tensor(name: str, array: np.ndarray, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), "FP32")
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def test_health_and_metadata(client: Caller) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("identity") and client.is_model_ready("identity", "1")
    assert not client.is_model_ready("identity", "7")
    assert client.get_server_metadata()["name"] == "tilewave"
    assert "system_shared_memory" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata("identity")["versions"] == ["1", "2"]
    assert client.get_model_metadata("identity", "1")["inputs"][0]["shape"] == [-1, 4]
    assert client.get_model_config("identity", "1")["max_batch_size"] == 16


def test_statistics(client: Caller) -> None:
    client.infer("identity", [tensor("input", VALUES)])
    (one,) = client.get_inference_statistics("identity", "2")["model_stats"]
    assert one["inference_count"] >= 2 and one["inference_stats"]["success"]["count"] >= 1
    assert {entry["name"] for entry in client.get_inference_statistics()["model_stats"]} >= {"identity", "colours"}


@pytest.mark.parametrize("request_compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("response_compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
def test_infer(client: Caller, binary: bool, request_compression: str | None, response_compression: str | None) -> None:
    result = client.infer(
        "identity",
        [tensor("input", VALUES, binary)],
        outputs=[triton.InferRequestedOutput("output", binary_data=binary)],
        request_id="r-1",
        model_version="1",
        priority=1,
        timeout=10_000_000,
        parameters={"mine": "is passed over"},
        request_compression_algorithm=request_compression,
        response_compression_algorithm=response_compression,
    )
    np.testing.assert_array_equal(result.as_numpy("output"), VALUES)
    assert (result.get_response()["id"], result.get_response()["model_version"]) == ("r-1", "1")


@pytest.mark.parametrize("binary", [False, True], ids=["JSON", "binary"])
@pytest.mark.parametrize("kind", ARRAYS)
def test_infer_in_other_datatypes(client: Caller, kind: str, binary: bool) -> None:
    array = ARRAYS[kind]
    given = triton.InferInput("input", list(array.shape), np_to_triton_dtype(array.dtype))
    given.set_data_from_numpy(array, binary_data=binary or kind == "half")
    wanted = triton.InferRequestedOutput("output", binary_data=binary)
    if kind == "half" and not binary:
        with pytest.raises(InferenceServerException, match="binary"):
            client.infer(kind, [given], outputs=[wanted])
        return
    found = client.infer(kind, [given], outputs=[wanted]).as_numpy("output")
    if kind == "strings":
        found = np.vectorize(lambda text: text.decode() if isinstance(text, bytes) else text, otypes=[object])(found)
    np.testing.assert_array_equal(found, array / 2 if kind == "half" else array)


def test_async_infer(served: Running) -> None:
    """Of the sync client alone: requests on greenlets."""
    CALLED["sync"].add("async_infer")
    with triton.InferenceServerClient(served.url.removeprefix("http://"), concurrency=4) as client:
        waiting = [client.async_infer("identity", [tensor("input", VALUES * i)]) for i in range(12)]
        for i, request in enumerate(waiting):
            np.testing.assert_array_equal(request.get_result().as_numpy("output"), VALUES * i)


def test_bodies_made_by_the_client_and_sent_by_hand(served: Running) -> None:
    for kind, client in (("sync", triton.InferenceServerClient), ("asyncio", triton_aio.InferenceServerClient)):
        CALLED[kind] |= {"generate_request_body", "parse_response_body"}
        body, length = client.generate_request_body([tensor("input", VALUES)])
        response = served.client.post(
            "/v2/models/identity/infer", content=body, headers={"Inference-Header-Content-Length": str(length)}
        )
        header = int(response.headers["inference-header-content-length"])
        result = client.parse_response_body(response.content, header_length=header)
        np.testing.assert_array_equal(result.as_numpy("output"), VALUES)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_an_answer_is_compressed_where_that_is_what_is_asked_for(served: Running, coding: str) -> None:
    body = {"inputs": [{"name": "input", "shape": [64, 4], "datatype": "FP32", "data": [1.0] * 256}]}

    def answer(accept: str) -> tuple[str | None, bytes]:
        headers = {"accept-encoding": accept}
        with served.client.stream("POST", "/v2/models/identity/infer", json=body, headers=headers) as response:
            return response.headers.get("content-encoding"), b"".join(response.iter_raw())

    encoding, packed = answer(coding)
    plain_encoding, plain = answer("identity")
    assert (encoding, plain_encoding) == (coding, None)
    assert len(packed) < len(plain)
    assert zlib.decompress(packed, 47) == plain
    for others in ("gzip, deflate", f"{coding};q=0", "br", "*"):
        assert answer(others)[0] is None
    assert answer(f"{coding.upper()};q=0.5")[0] == coding


def test_index_load_unload(client: Caller) -> None:
    client.unload_model("colours", unload_dependents=True)
    assert not client.is_model_ready("colours")
    entry = next(entry for entry in client.get_model_repository_index() if entry["name"] == "colours")
    assert (entry["state"], entry["reason"]) == ("UNAVAILABLE", "unloaded")
    with pytest.raises(InferenceServerException, match="unloaded") as refused:
        client.infer("colours", [tensor("input", np.zeros((1, 3, 8, 8), np.float32))])
    assert refused.value.status() == "503"
    client.load_model("colours")
    assert client.is_model_ready("colours")
    client.infer("colours", [tensor("input", np.zeros((1, 3, 8, 8), np.float32))])
    with pytest.raises(InferenceServerException, match="no model 'nobody'") as unknown:
        client.load_model("nobody")
    assert unknown.value.status() == "404"
    with pytest.raises(InferenceServerException, match="come from the repository only") as refused:
        client.load_model("colours", config="{}")
    assert refused.value.status() == "400"


@pytest.fixture
def key() -> Iterator[str]:
    name = f"/tilewave_test_{os.getpid()}_{uuid.uuid4().hex[:8]}"
    yield name
    Path(f"/dev/shm{name}").unlink(missing_ok=True)


def test_system_shared_memory(client: Caller, key: str) -> None:
    region = shm.create_shared_memory_region("mine", key, 2 * VALUES.nbytes)
    shm.set_shared_memory_region(region, [VALUES])
    client.register_system_shared_memory("mine", key, 2 * VALUES.nbytes)
    try:
        expected = {"name": "mine", "key": key, "offset": 0, "byte_size": 2 * VALUES.nbytes}
        assert client.get_system_shared_memory_status() == [expected]
        assert client.get_system_shared_memory_status("mine") == [expected]
        given = triton.InferInput("input", [2, 4], "FP32")
        given.set_shared_memory("mine", VALUES.nbytes)
        wanted = triton.InferRequestedOutput("output")
        wanted.set_shared_memory("mine", VALUES.nbytes, offset=VALUES.nbytes)
        result = client.infer("identity", [given], outputs=[wanted])
        output = result.get_output("output")
        assert output == {"name": "output", "datatype": "FP32", "shape": [2, 4]}
        there = shm.get_contents_as_numpy(region, np.float32, [2, 4], offset=VALUES.nbytes)
        np.testing.assert_array_equal(there, VALUES)
        with pytest.raises(InferenceServerException, match="registered already"):
            client.register_system_shared_memory("mine", key, 4)
    finally:
        client.unregister_system_shared_memory("mine")
        shm.destroy_shared_memory_region(region)
    assert client.get_system_shared_memory_status() == []
    client.unregister_system_shared_memory()
    with pytest.raises(InferenceServerException, match="no shared-memory region 'mine'"):
        client.get_system_shared_memory_status("mine")


def test_an_output_in_shared_memory_has_no_parameters_whatever_its_values(client: Caller, key: str) -> None:
    """The C++ client takes parameters of an output as the size of binary data."""
    values = np.full((1, VALUES.shape[1]), np.nan, VALUES.dtype)
    region = shm.create_shared_memory_region("mine", key, values.nbytes)
    client.register_system_shared_memory("mine", key, values.nbytes)
    try:
        wanted = triton.InferRequestedOutput("output", binary_data=False)
        wanted.set_shared_memory("mine", values.nbytes)
        result = client.infer("identity", [tensor("input", values)], outputs=[wanted])
        assert "parameters" not in result.get_output("output")
        assert shm.get_contents_as_numpy(region, values.dtype, list(values.shape)).tobytes() == values.tobytes()
    finally:
        client.unregister_system_shared_memory("mine")
        shm.destroy_shared_memory_region(region)


def test_classification(client: Caller) -> None:
    array = np.array([[0.5, 0.25, 0.75, 0.25], [1, 2, 3, 4]], np.float32)
    wanted = [triton.InferRequestedOutput("output", class_count=3)]
    result = client.infer("identity", [tensor("input", array)], outputs=wanted)
    assert result.as_numpy("output").tolist() == [
        [b"0.750000:2", b"0.500000:0", b"0.250000:1"],
        [b"4.000000:3", b"3.000000:2", b"2.000000:1"],
    ]


def test_classification_has_the_labels_of_the_model(client: Caller) -> None:
    picture = np.zeros((1, 3, 8, 8), np.float32)
    picture[:, 1] = 2
    wanted = [triton.InferRequestedOutput("logits", class_count=9, binary_data=False)]
    result = client.infer("colours", [tensor("input", picture)], outputs=wanted)
    assert result.get_output("logits")["data"] == ["2.000000:1:green", "0.000000:0:red", "0.000000:2:blue"]
    assert result.get_output("logits")["shape"] == [1, 3]


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
def test_every_call_is_tested(kind: str) -> None:
    """After those above: what the client offers is what they called."""
    client = triton.InferenceServerClient if kind == "sync" else triton_aio.InferenceServerClient
    offered = {name for name, _ in inspect.getmembers(client, callable) if not name.startswith("_")}
    offered -= {"plugin", "register_plugin", "unregister_plugin"}  # of the client itself
    assert offered - NOT_OURS == CALLED[kind]


def test_what_is_not_offered_is_not_found_in_words(served: Running) -> None:
    for path in ("/v2/trace/setting", "/v2/logging", "/v2/cudasharedmemory/status"):
        response = served.client.get(path)
        assert response.status_code == 404 and path in error_of(response)


def test_an_empty_raw_body_is_no_row(served: Running) -> None:
    headers = {"Inference-Header-Content-Length": "0"}
    response = served.client.post("/v2/models/identity/infer", content=b"", headers=headers)
    assert response.status_code == 400
    assert "has 0 elements" in error_of(response)
    response = served.client.post("/v2/models/identity/infer", content=b"\0" * 20, headers=headers)
    assert response.status_code == 400
    assert "has 5 elements; its shape [1, 4] holds 4" in error_of(response)
    assert served.identity([1, 2, 3, 4]).status_code == 200


def test_a_tensor_of_too_many_elements_is_too_large(tmp_path: Path) -> None:
    starter = Starter()
    try:
        add_model(tmp_path, "identity", "identity")
        server = starter(tmp_path, max_tensor_elements=8)
        assert server.identity([1.0] * 8).status_code == 200
        response = server.identity([1.0] * 12)
        assert response.status_code == 413
        assert "12 elements; the limit is 8" in error_of(response)
        header = {"inputs": [{"name": "input", "shape": [3, 4], "datatype": "FP32"}]}
        header["inputs"][0]["parameters"] = {"binary_data_size": 48}  # type: ignore[assignment]
        text = json.dumps(header).encode()
        sizes = {"Inference-Header-Content-Length": str(len(text))}
        response = server.client.post("/v2/models/identity/infer", content=text + bytes(48), headers=sizes)
        assert response.status_code == 413
    finally:
        starter.stop()
