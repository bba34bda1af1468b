"""Damaged and hostile files: always an error of the engine that says what is wrong, never another exception, and never
an allocation that the file's own size does not justify."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engine.errors import EngineError, ModelError, UnsupportedOp
from engine.frontend import read
from tests.engine.frontend.models import convnet, model, node, shape_arithmetic, tensor

MEMORY_BOUND = 256 * 2**20  # bytes by which the process may grow over a whole test


@pytest.fixture(autouse=True)
def memory_stays_bounded() -> Any:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY_BOUND


def refused(proto: onnx.ModelProto, match: str, error: type[EngineError] = ModelError) -> None:
    with pytest.raises(error, match=match):
        read(proto.SerializeToString())


def read_or_refuse(data: bytes) -> bool:
    """Whether `data` could be read; any exception that is not the engine's own fails the test."""
    try:
        read(data)
    except EngineError:
        return False
    return True


@pytest.mark.parametrize("build", [convnet, shape_arithmetic])
def test_truncated_files(build: Any) -> None:
    data = build().SerializeToString()
    assert read_or_refuse(data)
    for length in range(0, len(data), 100 if len(data) > 3000 else 10):
        read_or_refuse(data[:length])
    assert not read_or_refuse(data[: len(data) // 2])


@pytest.mark.parametrize("build", [convnet, shape_arithmetic])
@pytest.mark.parametrize("seed", range(3))
def test_flipped_bytes(build: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = build().SerializeToString()
    for _ in range(400):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), rng.integers(1, 4)):
            damaged[position] = rng.integers(0, 256)
        read_or_refuse(bytes(damaged))


@pytest.mark.parametrize("what", ["xxxx", "yyyy", "nnnn", "Relu"])
def test_names_that_are_not_text(what: str) -> None:
    data = model([node("Relu", "xxxx", "yyyy")], [tensor("xxxx", ["nnnn"])], ["yyyy"]).SerializeToString()
    read(data)
    with pytest.raises(ModelError, match=r"is not UTF-8: b'mod\\xe8"):
        read(data.replace(what.encode(), b"mod\xe8"))


@pytest.mark.parametrize("data", [b"", b"\0", b"this is no model", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(4096)])
def test_not_onnx(data: bytes) -> None:
    with pytest.raises(ModelError):
        read(data)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        read(tmp_path / "absent.onnx")
    with pytest.raises(ModelError):
        read(tmp_path)
    with pytest.raises(ModelError):
        read("bad\0name")


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><title>Not found</title>", "a web page; download the file itself"),
        (b"\x89PNG\r\n\x1a\n", "copy or export the model again"),
        (b"", "the file is empty"),
    ],
)
def test_other_files_say_what_to_do(data: bytes, remedy: str) -> None:
    with pytest.raises(ModelError, match=remedy):
        read(data)


def test_an_unknown_operator_says_where_it_was_looked_for() -> None:
    proto = model([node("Frobnicate", "x", "y")], [tensor("x", [2])], ["y"])
    refused(proto, "no operator 'Frobnicate' in domain 'ai.onnx' version", UnsupportedOp)


def test_cycle() -> None:
    nodes = [node("Add", "x b", "a"), node("Relu", "a", "b")]
    refused(model(nodes, [tensor("x", [2])], ["b"]), "cycle")


def test_self_cycle() -> None:
    refused(model([node("Add", "x y", "y")], [tensor("x", [2])], ["y"]), "cycle")


def test_nodes_out_of_order_are_sorted() -> None:
    nodes = [node("Relu", "a", "y"), node("Neg", "x", "a")]
    graph = read(model(nodes, [tensor("x", [2])], ["y"]).SerializeToString())
    assert [n.origin for n in graph.nodes] == ["Neg_a", "Relu_y"]


def test_name_computed_twice() -> None:
    nodes = [node("Relu", "x", "y"), node("Neg", "x", "y")]
    refused(model(nodes, [tensor("x", [2])], ["y"]), "computed twice")
    refused(model([node("Relu", "x", "x")], [tensor("x", [2])], ["x"]), "computed twice")


def test_undefined_input() -> None:
    refused(model([node("Relu", "ghost", "y")], [tensor("x", [2])], ["y"]), "'ghost' is read but nothing computes it")
    refused(model([node("Relu", "x", "y")], [tensor("x", [2])], ["z"]), "'z' is read but nothing computes it")


def test_duplicate_inputs_and_initializers() -> None:
    refused(model([node("Relu", "x", "y")], [tensor("x", [2]), tensor("x", [2])], ["y"]), "'x'")
    twice = model([node("Relu", "x", "y")], [tensor("x", [2])], ["y"], {"w": np.zeros(2)})
    twice.graph.initializer.append(twice.graph.initializer[0])
    refused(twice, "two initializers")


@pytest.mark.parametrize("dims", [[2**40], [2**31, 2**31, 2**31], [-1], [2**62, 4], [1] * 100, [10**9, 10**9]])
def test_tensor_that_claims_terabytes(dims: list[int]) -> None:
    proto = model([node("Add", "x w", "y")], [tensor("x", [2])], ["y"])
    proto.graph.initializer.append(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=b"\0" * 8))
    refused(proto, "'w'")


@pytest.mark.parametrize("field", ["raw_data", "float_data"])
def test_tensor_with_too_little_data(field: str) -> None:
    proto = model([node("Add", "x w", "y")], [tensor("x", [2])], ["y"])
    content: Any = b"\0" * 4 if field == "raw_data" else [0.0]
    proto.graph.initializer.append(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], **{field: content}))
    refused(proto, "truncated or damaged")


def test_constants_that_unfold_without_end_stay_small() -> None:
    huge = {"shape": np.array([2**20, 2**20]), "repeats": np.array([2**15, 2**15])}
    nodes = [node("ConstantOfShape", "shape", "c"), node("Tile", "c repeats", "t"), node("Add", "t x", "y")]
    read_or_refuse(model(nodes, [tensor("x", [1])], ["y"], huge).SerializeToString())
    ranges = {"a": np.array(0), "b": np.array(2**40), "c": np.array(1)}
    read_or_refuse(model([node("Range", "a b c", "y")], [], ["y"], ranges).SerializeToString())
    overflow = {"shape": np.array([2**62, 2**62])}
    refused(model([node("ConstantOfShape", "shape", "y")], [], ["y"], overflow), "ConstantOfShape")


def test_sizes_that_grow_without_end() -> None:
    nodes = [node("Shape", "x", "s0")]
    nodes += [node("Mul" if i % 2 else "Add", f"s{i} {'s' if i % 2 else 't'}{i}", f"s{i + 1}") for i in range(40)]
    nodes += [node("Identity", f"s{i}" if i % 2 else "x1", f"t{i}") for i in range(40)]
    nodes += [node("Shape", "z", "x1"), node("Reshape", "x s40", "y")]
    proto = model(nodes, [tensor("x", ["a", "b"]), tensor("z", ["c", "d"])], ["y"])
    assert not read_or_refuse(proto.SerializeToString())


def test_opset_too_new_and_too_old() -> None:
    newest = onnx.defs.onnx_opset_version()
    proto = model([node("Relu", "x", "y")], [tensor("x", [2])], ["y"])
    proto.opset_import[0].version = newest + 1
    refused(proto, rf"opset {newest + 1} is newer than .* \({newest}\); update onnx")
    proto.opset_import[0].version = 8
    refused(proto, "opset 8 is older than 9; convert")
    proto.opset_import[0].version = newest
    proto.ir_version = onnx.IR_VERSION + 1
    refused(proto, "IR version")


def test_unknown_operator_and_domain() -> None:
    refused(model([node("Frobnicate", "x", "y")], [tensor("x", [2])], ["y"]), "Frobnicate_y.*Frobnicate", UnsupportedOp)
    strange = model([node("Relu", "x", "y", domain="com.example")], [tensor("x", [2])], ["y"])
    refused(strange, "com.example", UnsupportedOp)


def test_operator_newer_than_the_opset() -> None:
    refused(model([node("Gelu", "x", "y")], [tensor("x", [2])], ["y"], opset=17), "Gelu", UnsupportedOp)


def test_wrong_numbers_of_inputs() -> None:
    refused(model([node("Add", "x", "y")], [tensor("x", [2])], ["y"]), "input 1 is missing")
    refused(model([node("Relu", "x x", "y")], [tensor("x", [2])], ["y"]), "2 inputs; at most 1")
    refused(model([node("Concat", "x _ x", "y", axis=0)], [tensor("x", [2])], ["y"]), "input is missing")


def test_attribute_of_the_wrong_type() -> None:
    refused(model([node("Softmax", "x", "y", axis="last")], [tensor("x", [2])], ["y"]), "'axis' is not of type INT")
    refused(model([node("Transpose", "x", "y", perm=[0, 0])], [tensor("x", [2, 2])], ["y"]), "perm")


def test_shapes_that_do_not_fit() -> None:
    two = [tensor("x", [2, 3]), tensor("z", [4, 5])]
    refused(model([node("Add", "x z", "y")], two, ["y"]), "Add_y.*broadcast")
    refused(model([node("MatMul", "x z", "y")], two, ["y"]), "MatMul_y.*inner sizes differ")
    refused(model([node("Reshape", "x s", "y")], two, ["y"], {"s": np.array([7])}), "Reshape_y")


def test_input_without_a_rank() -> None:
    proto = model([node("Relu", "x", "y")], [tensor("x", [2])], ["y"])
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    refused(proto, "input 'x' has no shape", UnsupportedOp)


def test_unused_operators_do_not_matter() -> None:
    nodes = [node("Relu", "x", "y"), node("Frobnicate", "x", "z")]
    assert len(read(model(nodes, [tensor("x", [2])], ["y"]).SerializeToString()).nodes) == 1


def test_subgraphs_nested_deeply() -> None:
    inner = helper.make_graph([node("Relu", "x", "r0")], "g", [], [helper.make_empty_tensor_value_info("r0")])
    for depth in range(1, 31):  # protobuf itself refuses a few levels more
        switch = node("If", "c", f"r{depth}", then_branch=inner)
        inner = helper.make_graph([switch], "g", [], [helper.make_empty_tensor_value_info(f"r{depth}")])
    proto = model(list(inner.node), [tensor("x", [2])], ["r30"], {"c": np.array(True)})
    assert len(read(proto.SerializeToString()).nodes) == 1


def function(name: str, calls: list[str]) -> onnx.FunctionProto:
    nodes = []
    value = "a"
    for i, called in enumerate(calls):
        nodes.append(helper.make_node(called, [value], [f"v{i}"], domain="local" if called != "Relu" else ""))
        value = f"v{i}"
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    return helper.make_function("local", name, ["a"], [value], nodes, imports)


def with_functions(*functions: onnx.FunctionProto) -> onnx.ModelProto:
    proto = model([node("F0", "x", "y", domain="local")], [tensor("x", [2])], ["y"], functions=list(functions))
    proto.opset_import.append(helper.make_opsetid("local", 1))
    return proto


def test_local_functions_are_inlined() -> None:
    graph = read(with_functions(function("F0", ["F1", "F1"]), function("F1", ["Relu"])).SerializeToString())
    assert len(graph.nodes) == 2
    assert graph.nodes[0].origin.startswith("F0_y/")


def test_recursive_functions() -> None:
    refused(with_functions(function("F0", ["F0"])), "nested or recursive")
    refused(with_functions(function("F0", ["F1"]), function("F1", ["F0"])), "nested or recursive")


def test_functions_that_unfold_without_end() -> None:
    functions = [function(f"F{i}", [f"F{i + 1}"] * 10) for i in range(20)]
    refused(with_functions(*functions, function("F20", ["Relu"])), "nodes once functions are unfolded")


def test_a_long_chain_of_nodes() -> None:
    nodes = [helper.make_node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(20_000)]
    graph = read(model(nodes, [tensor("v0", [2])], ["v20000"]).SerializeToString())
    assert len(graph.nodes) == 20_000


# --- external data ----------------------------------------------------------------------------------------------------


def external(folder: Path, location: str, **entries: Any) -> Path:
    """A model of one weight of two floats that lies in another file."""
    proto = model([node("Add", "x w", "y")], [tensor("x", [2])], ["y"])
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        weight.external_data.add(key=key, value=str(value))
    proto.graph.initializer.append(weight)
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "secret.bin").write_bytes(b"\1" * 64)
    return inside


def test_external_data_is_read(folder: Path) -> None:
    graph = read(external(folder, "w.bin", offset=4, length=8))
    (weight,) = [value for value in graph.nodes[0].inputs if value.is_constant]
    np.testing.assert_array_equal(weight.data, np.array([1, 2], np.float32))


def test_external_data_beside_the_real_file_of_a_link(tmp_path: Path, folder: Path) -> None:
    """A download cache links model.onnx and its data to files elsewhere."""
    path = external(folder, "w.bin")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.onnx").symlink_to(path)
    (snapshot / "w.bin").symlink_to(folder / "w.bin")
    assert read(snapshot / "model.onnx").nodes


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "x/../../secret.bin", "", "w\0.bin", "link.bin"])
def test_external_data_outside_the_folder(folder: Path, location: str) -> None:
    (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
    with pytest.raises(ModelError, match=r"outside the model's folder|usable location"):
        read(external(folder, location))


@pytest.mark.parametrize(
    "entries",
    [{"offset": 12}, {"offset": 2**62}, {"length": 4}, {"length": 2**40}, {"offset": -4}, {"offset": "1e3"}],
)
def test_external_data_beyond_the_file(folder: Path, entries: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="'w'"):
        read(external(folder, "w.bin", **entries))


def test_external_data_missing_or_not_a_file(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"'absent.bin' is missing"):
        read(external(folder, "absent.bin"))
    with pytest.raises(ModelError):
        read(external(folder, "."))
    with pytest.raises(ModelError, match="as a path, not as bytes"):
        read(external(folder, "w.bin").read_bytes())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_external_data_in_a_pipe_does_not_block(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(ModelError, match="not a regular file"):
        read(external(folder, "pipe"))


# --- storage forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 16, 17])
def test_every_element_type_in_both_storage_forms(number: int, raw: bool) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(number)
    content = np.array([[0, 1], [1, 3]]).astype(dtype)
    stored = numpy_helper.from_array(content, "w")
    if not raw and number in (10, 16, 17):  # narrow floats are stored as the low bits of an int32
        bits = content.view(f"u{dtype.itemsize}").flatten()
        stored = TensorProto(name="w", data_type=number, dims=[2, 2], int32_data=bits)
    elif not raw:
        stored = helper.make_tensor("w", number, [2, 2], content.flatten().tolist())
    proto = model([node("Identity", "w", "y")], [], ["y"])
    proto.graph.initializer.append(stored)
    (value,) = read(proto.SerializeToString()).outputs
    assert value.data is not None
    assert value.data.dtype == dtype
    np.testing.assert_array_equal(value.data.astype(np.float64), content.astype(np.float64))


@pytest.mark.parametrize("number", [14, 15, 18, 19, 20, 21, 22, 23, 99, 0])
def test_other_element_types_are_refused(number: int) -> None:
    proto = model([node("Identity", "w", "y")], [], ["y"])
    proto.graph.initializer.append(TensorProto(name="w", data_type=number, dims=[2], raw_data=b"\0" * 16))
    refused(proto, "'w'.*element type")
