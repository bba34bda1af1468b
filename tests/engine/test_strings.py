"""Models with string tensors: no kernel touches them, the host moves them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import engine

WORDS = np.array([["one", "two", ""], ["vier", "fünf", "six"]], object)
Nodes = list[onnx.NodeProto]
node = helper.make_node


def model(nodes: Nodes, *constants: tuple[str, np.ndarray]) -> onnx.ModelProto:
    """From the strings "x" [n, 3] to "y", of any type."""
    graph = helper.make_graph(
        nodes,
        "strings",
        [helper.make_tensor_value_info("x", TensorProto.STRING, ["n", 3])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(array, name) for name, array in constants],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CASES: dict[str, tuple[Any, ...]] = {
    "identity": ([node("Identity", ["x"], ["y"])],),
    "transpose": ([node("Transpose", ["x"], ["y"], perm=[1, 0])],),
    "reshape": (
        [node("Transpose", ["x"], ["t"], perm=[1, 0]), node("Reshape", ["t", "s"], ["y"])],
        ("s", numbers(-1)),
    ),
    "slice": (
        [node("Slice", ["x", "a", "b", "axis", "step"], ["y"])],
        ("a", numbers(2)), ("b", numbers(-9)), ("axis", numbers(1)), ("step", numbers(-2)),
    ),
    "concat": (
        [
            node("Slice", ["x", "a", "b", "axis"], ["first"]),
            node("Concat", ["first", "x", "more"], ["y"], axis=1),
        ],
        ("a", numbers(0)), ("b", numbers(1)), ("axis", numbers(1)), ("more", np.array([["m"], ["n"]], object)),
    ),
    "split": (
        [node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=3), node("Concat", ["c", "a"], ["y"], axis=1)],
    ),
    "expand": ([node("Unsqueeze", ["x", "one"], ["u"]), node("Expand", ["u", "s"], ["y"])],
               ("one", numbers(1)), ("s", numbers(1, 2, 1))),
    "gather": ([node("Gather", ["x", "i"], ["y"], axis=1)], ("i", numbers(2, 0, 2))),
    "where": ([node("Where", ["c", "x", "other"], ["y"])],
              ("c", np.array([True, False, True])), ("other", np.array(["-"], object))),
    "tile": ([node("Tile", ["x", "r"], ["y"])], ("r", numbers(1, 2))),
    "equal": ([node("Equal", ["x", "k"], ["y"])], ("k", np.array(["one", "six", ""], object))),
    "joined": ([node("StringConcat", ["x", "x"], ["j"]), node("Transpose", ["j"], ["y"], perm=[1, 0])],),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_strings_are_moved_as_onnx_says(case: str) -> None:
    nodes, *constants = CASES[case]
    made = model(nodes, *constants)
    (expected,) = ReferenceEvaluator(made).run(None, {"x": WORDS})
    with engine.load(made.SerializeToString(), device="cpu") as loaded:
        got = loaded.run({"x": WORDS})["y"]
    assert got.shape == np.shape(expected)
    assert got.tolist() == np.asarray(expected).tolist()


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)], "'one'"),
        (
            [node("Cast", ["x"], ["i"], to=TensorProto.INT64), node("Gather", ["x", "i"], ["y"], axis=1)],
            "out of bounds",
        ),
    ],
)
def test_strings_that_an_operator_cannot_read_are_the_callers_error(nodes: Nodes, words: str) -> None:
    feeds = WORDS if words == "'one'" else np.array([["0", "7", "1"]], object)
    with (
        engine.load(model(nodes).SerializeToString(), device="cpu") as loaded,
        pytest.raises(engine.ShapeError, match=words),
    ):
        loaded.run({"x": feeds})


def test_strings_are_str() -> None:
    made = model(CASES["identity"][0])
    with (
        engine.load(made.SerializeToString(), device="cpu") as loaded,
        pytest.raises(engine.ShapeError, match=r"'x' holds bytes at \[0, 1\], the model wants str; decode bytes first"),
    ):
        loaded.run({"x": np.array([["a", b"b", 3]], object)})


def test_sampled_strings_are_accepted_and_read_as_numbers() -> None:
    nodes = [node("Cast", ["x"], ["i"], to=TensorProto.INT64), node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)]
    with engine.load(model(nodes).SerializeToString(), device="cpu") as loaded:
        feeds = loaded.sample_feeds({"n": 5})
        assert all(type(word) is str for word in feeds["x"].flat)
        assert loaded.run(feeds)["y"].tolist() == feeds["x"].astype(float).tolist()
