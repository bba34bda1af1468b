"""The checkpoint reader reads tensors and nothing else. Checkpoints here are written by the test, without torch."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import FormatError
from models.torch_pickle import load_state_dict

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}


class FakeStorage:
    """Pickled as torch pickles a storage: by a persistent id."""

    def __init__(self, key: str, values: np.ndarray, count: int | None = None) -> None:
        self.key, self.values, self.count = key, values, values.size if count is None else count


class FakeTensor:
    """Pickled as torch pickles a tensor."""

    def __init__(self, storage: FakeStorage, offset: Any, shape: Any, strides: Any) -> None:
        self.arguments = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class CheckpointPickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, FakeStorage):
            return ("storage", sys.modules["torch"].FloatStorage, obj.key, "cpu", obj.count, None)
        return None


@pytest.fixture(autouse=True)
def torch_names() -> Iterator[None]:
    """Modules by torch's names, so that pickle can write references to them; the reader never imports them."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})  # type: ignore[attr-defined]

    def _rebuild_tensor_v2() -> None: ...

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
    replaced = {"torch": torch, "torch._utils": utils}
    before = {name: sys.modules.get(name) for name in replaced}
    sys.modules.update(replaced)
    yield
    for name, module in before.items():
        sys.modules.pop(name) if module is None else sys.modules.update({name: module})


def checkpoint(state: object, storages: list[FakeStorage], system: object = SYSTEM, magic: int = MAGIC) -> bytes:
    file = io.BytesIO()
    for item in (magic, 1001, system):
        pickle.dump(item, file, protocol=2)
    CheckpointPickler(file, protocol=2).dump(state)
    pickle.dump([storage.key for storage in storages], file, protocol=2)
    for storage in storages:
        file.write(struct.pack("<q", storage.values.size) + storage.values.astype("<f4").tobytes())
    return file.getvalue()


def valid_checkpoint() -> bytes:
    storage = FakeStorage("a", np.arange(6, dtype=np.float32))
    return checkpoint({"weight": FakeTensor(storage, 0, (2, 3), (3, 1))}, [storage])


def test_tensors_come_back_with_shape_strides_and_offset() -> None:
    storage = FakeStorage("a", np.arange(10, dtype=np.float32))
    state = OrderedDict(
        row_major=FakeTensor(storage, 0, (2, 3), (3, 1)),
        transposed=FakeTensor(storage, 4, (3, 2), (1, 3)),
        scalar=FakeTensor(storage, 9, (), ()),
        empty=FakeTensor(storage, 0, (0, 4), (4, 1)),
    )
    tensors = load_state_dict(checkpoint(state, [storage]))
    np.testing.assert_array_equal(tensors["row_major"], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(tensors["transposed"], [[4, 7], [5, 8], [6, 9]])
    assert tensors["scalar"] == 9
    assert tensors["empty"].shape == (0, 4)


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"

    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(trace),)

    with pytest.raises(FormatError, match="mkdir.*nothing was executed"):
        load_state_dict(checkpoint({"weight": Malicious()}, []))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "torch._utils._rebuild_tensor", "torch.load"])
def test_other_globals_are_refused(name: str) -> None:
    module, attribute = name.rsplit(".", 1)
    evil = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"(X\x01\x00\x00\x00atR."
    head = b"".join(pickle.dumps(item, 2) for item in (MAGIC, 1001, SYSTEM))
    with pytest.raises(FormatError, match=attribute):
        load_state_dict(head + evil)


def test_opcodes_outside_the_format_are_refused_before_unpickling() -> None:
    with pytest.raises(FormatError, match="INST"):
        load_state_dict(b"\x80\x02(X\x01\x00\x00\x00aios\nsystem\n.")


def test_a_huge_memo_index_does_not_take_memory() -> None:
    with pytest.raises(FormatError, match="memo index"):
        load_state_dict(b"\x80\x02K\x01r\xff\xff\xff\x7f.")


@pytest.mark.parametrize("length", [0, 1, 10, 30, 200, -1, -20])
def test_a_truncated_checkpoint_is_a_clear_error(length: int) -> None:
    whole = valid_checkpoint()
    with pytest.raises(FormatError):
        load_state_dict(whole[: length if length >= 0 else len(whole) + length])


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (1, (2, 3), (3, 1)),
        (0, (2, 3), (4, 1)),
        (-1, (2, 3), (3, 1)),
        (0, (-2, 3), (3, 1)),
        (0, (2, 3), (-3, 1)),
        (0, (2, 3), (3,)),
        (0, (1 << 62, 1), (1, 1)),
        (0, "23", (3, 1)),
        (0, (2.0, 3), (3, 1)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(offset: Any, shape: Any, strides: Any) -> None:
    storage = FakeStorage("a", np.arange(6, dtype=np.float32))
    with pytest.raises(FormatError):
        load_state_dict(checkpoint({"weight": FakeTensor(storage, offset, shape, strides)}, [storage]))


def test_a_storage_that_claims_terabytes_is_refused() -> None:
    storage = FakeStorage("a", np.arange(6, dtype=np.float32), count=1 << 40)
    with pytest.raises(FormatError, match="elements"):
        load_state_dict(checkpoint({"weight": FakeTensor(storage, 0, (2, 3), (3, 1))}, [storage]))


def test_other_contents_are_refused() -> None:
    storage = FakeStorage("a", np.arange(6, dtype=np.float32))
    tensor = FakeTensor(storage, 0, (2, 3), (3, 1))
    with pytest.raises(FormatError, match="not a tensor"):
        load_state_dict(checkpoint({"weight": [1, 2]}, []))
    with pytest.raises(FormatError, match="not a mapping"):
        load_state_dict(checkpoint([tensor], [storage]))
    with pytest.raises(FormatError, match="magic"):
        load_state_dict(checkpoint({"weight": tensor}, [storage], magic=1))
    with pytest.raises(FormatError, match="little-endian"):
        load_state_dict(checkpoint({"weight": tensor}, [storage], system={"little_endian": False}))
    with pytest.raises(FormatError, match="does not hold"):
        load_state_dict(checkpoint({"weight": tensor}, []))
    with pytest.raises(FormatError, match="zip"):
        load_state_dict(b"PK\x03\x04" + bytes(100))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_are_an_error_or_tensors_never_anything_else(data: st.DataObject) -> None:
    damaged = bytearray(valid_checkpoint())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        tensors = load_state_dict(bytes(damaged))
    except FormatError:
        return
    assert all(isinstance(tensor, np.ndarray) for tensor in tensors.values())
