"""System shared memory of clients: what may be registered, and what a hostile owner of a segment can do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.client_memory import ClientMemory, Place
from service.codecs.outputs import Classes, best_classes
from service.errors import Forbidden, InvalidRequest, NotFound, ServiceError, Unsupported
from tests.service.conftest import Running, Start, error_of


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[ClientMemory]:
    """Segments are the files of a folder."""
    (tmp_path / "app_one").write_bytes(bytes(range(64)))
    (tmp_path / "other").write_bytes(bytes(64))
    os.mkfifo(tmp_path / "app_pipe")
    (tmp_path / "app_folder").mkdir()
    (tmp_path / "app_link").symlink_to(tmp_path / "other")
    made = ClientMemory(("/app_",), tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("key", "offset", "nbytes", "error", "words"),
    [
        ("/other", 0, 4, Forbidden, "none of the prefixes"),
        ("/app_../other", 0, 4, InvalidRequest, "no name"),
        ("/app_/../other", 0, 4, InvalidRequest, "no name"),
        ("app_one", 0, 4, InvalidRequest, "no name"),
        ("/", 0, 4, InvalidRequest, "no name"),
        ("", 0, 4, InvalidRequest, "no name"),
        ("/app_\0", 0, 4, InvalidRequest, "no name"),
        ("/app_" + "x" * 400, 0, 4, InvalidRequest, "no name"),
        ("/app_none", 0, 4, NotFound, "no shared-memory segment"),
        ("/app_one", 0, 65, InvalidRequest, "has 64 bytes; the region ends at 65"),
        ("/app_one", 1 << 62, 1, InvalidRequest, "has 64 bytes"),
        ("/app_one", 0, 0, InvalidRequest, "at least one byte"),
        ("/app_pipe", 0, 4, InvalidRequest, "no shared-memory segment"),
        ("/app_folder", 0, 4, InvalidRequest, "cannot be opened"),
        ("/app_link", 0, 4, InvalidRequest, "cannot be opened"),
    ],
)
def test_what_cannot_be_registered(
    memory: ClientMemory, key: str, offset: int, nbytes: int, error: type[ServiceError], words: str
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(error, match=words):
        memory.register("r", key, offset, nbytes)
    assert memory.regions(None) == []
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 33), (33, 0), (32, 1), (1 << 62, 1 << 62)])
def test_a_place_outside_its_region_is_refused(memory: ClientMemory, offset: int, nbytes: int) -> None:
    memory.register("r", "/app_one", 16, 32)
    assert memory.read(Place("r", 0, 32)) == bytes(range(16, 48))
    for call in (memory.read, memory.check, lambda place: memory.write(place, b"")):
        with pytest.raises(InvalidRequest, match="not within it"):
            call(Place("r", offset, nbytes))


def test_a_segment_that_gets_shorter_is_an_error_and_no_crash(memory: ClientMemory, tmp_path: Path) -> None:
    memory.register("r", "/app_one", 0, 64)
    os.truncate(tmp_path / "app_one", 10)
    for call in (lambda: memory.read(Place("r", 0, 64)), lambda: memory.write(Place("r", 0, 64), bytes(64))):
        with pytest.raises(InvalidRequest, match="become shorter"):
            call()
    assert (tmp_path / "app_one").stat().st_size == 10


def test_an_output_larger_than_its_place_is_refused(memory: ClientMemory) -> None:
    memory.register("r", "/app_one", 0, 64)
    with pytest.raises(InvalidRequest, match="has 9 bytes, but 8 were given"):
        memory.write(Place("r", 0, 8), bytes(9))
    assert memory.read(Place("r", 0, 64)) == bytes(range(64))


def test_unregistering_closes(memory: ClientMemory) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for name in "abc":
        memory.register(name, "/app_one", 0, 64)
    with pytest.raises(InvalidRequest, match="registered already"):
        memory.register("a", "/app_one", 0, 64)
    memory.unregister("a")
    memory.unregister("a")
    assert [region.name for region in memory.regions(None)] == ["b", "c"]
    memory.unregister(None)
    assert len(os.listdir("/proc/self/fd")) == before


def test_off_by_default(shared: Running) -> None:
    assert "system_shared_memory" not in shared.client.get("/v2").json()["extensions"]
    response = shared.client.post("/v2/systemsharedmemory/region/r/register", json={"key": "/x", "byte_size": 4})
    assert response.status_code == 400 and "is off" in error_of(response)
    for path in ("/v2/systemsharedmemory/status", "/v2/systemsharedmemory/region/r/status"):
        assert "is off" in error_of(shared.client.get(path))
    with pytest.raises(Unsupported):
        ClientMemory(()).register("r", "/x", 0, 4)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "'key' is null"),
        ({"key": 3}, "'key' is 3"),
        ({"key": "/app_x", "byte_size": "4"}, "'byte_size' is the string '4'"),
        ({"key": "/app_x", "byte_size": 4, "offset": -1}, "'offset' is -1"),
        ({"key": "/app_x", "byte_size": 1 << 63}, "'byte_size'"),
    ],
)
def test_bad_registrations(start: Start, repository: Path, body: dict[str, Any], words: str) -> None:
    server = start(repository, shared_memory_prefixes="/app_,/web_")
    response = server.client.post("/v2/systemsharedmemory/region/r/register", json=body)
    assert response.status_code == 400
    assert words in error_of(response)


@pytest.mark.parametrize(
    ("array", "batched", "labels", "expected"),
    [
        (np.array([3, 250, 7], np.uint8), False, (), ["250:1", "7:2"]),
        (np.array([[-3, -1, -2]], np.int64), True, ("a", "b", "c"), [["-1:1:b", "-2:2:c"]]),
        (np.array([[np.nan, 1, np.inf]], np.float32), True, ("a", "b"), [["inf:2", "1.000000:1"]]),
        (np.array([[1, 1, 1]], np.float16), True, (), [["1.000000:0", "1.000000:1"]]),
        (np.array([[[1, 2], [4, 3]]], np.float64), True, (), [["4.000000:2", "3.000000:3"]]),
        (np.array([[True, False, True]]), True, (), [["1:0", "1:2"]]),
        (np.array(5.0, np.float32), True, (), ["5.000000:0"]),
    ],
)
def test_best_classes(array: np.ndarray, batched: bool, labels: tuple[str, ...], expected: list[Any]) -> None:
    assert best_classes(array, 2, Classes(batched, labels)).tolist() == expected
