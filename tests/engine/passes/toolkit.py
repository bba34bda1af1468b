"""What the tests of the passes share: models written as ONNX text, and the comparison of a rewritten graph with them.

Everything runs in float64, against `onnx.reference` on the file and against the interpreter on the graph before the
passes, so that a mistake would have to be made in three places to go unseen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import onnx.parser
from onnx.reference import ReferenceEvaluator

from engine.frontend import read
from engine.ir import ops
from engine.ir.graph import Graph, Node
from engine.ir.printer import graph_text
from engine.passes import PASSES, Traits
from tests.engine import ir_interpreter

TRAITS = Traits(permuted_rows=True)
TOLERANCE = 1e-11  # relative L2; float64 on both sides, sums of at most a few hundred terms
Arrays = Mapping[str, np.ndarray]
Pass = Callable[[Graph, Traits], None]


def model(text: str, weights: Arrays | None = None, opset: int = 18) -> onnx.ModelProto:
    """A model from ONNX's textual syntax: ``(double[b,4] x) => (double[b,4] y) { y = Relu(x) }``, plus initializers."""
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> test '
    proto = onnx.parser.parse_model(head + text)
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(array, order="C"), name))
    return proto


def load(proto: onnx.ModelProto) -> Graph:
    """The graph of the model, as the frontend writes it."""
    return read(proto.SerializeToString())


def rewritten(proto: onnx.ModelProto, passes: Sequence[Pass] = PASSES, traits: Traits = TRAITS) -> Graph:
    """The graph after `passes`, validated after each."""
    graph = load(proto)
    for rewrite in passes:
        rewrite(graph, traits)
        try:
            graph.validate()
        except AssertionError as error:
            raise AssertionError(f"after {rewrite.__name__}: {error}\n{graph_text(graph)}") from error
    return graph


def check(
    proto: onnx.ModelProto,
    feeds: Arrays,
    passes: Sequence[Pass] = PASSES,
    traits: Traits = TRAITS,
    tolerance: float = TOLERANCE,
    reference: bool = True,
) -> Graph:
    """The graph after `passes`, having compared its outputs with those of `onnx.reference` and of the graph before.

    `reference=False` leaves the former out, where `onnx.reference` does not have what the model uses.
    """
    with np.errstate(all="ignore"):
        graph = rewritten(proto, passes, traits)
        before = ir_interpreter.run(load(proto), feeds)
        after = ir_interpreter.run(graph, feeds)
        expected = ReferenceEvaluator(proto).run(None, dict(feeds)) if reference else list(before.values())
    for name, array in zip([output.name for output in proto.graph.output], expected, strict=True):
        close(before[name], array, tolerance, f"{name}: the interpreter against onnx.reference")
        close(after[name], array, tolerance, f"{name}: after the passes\n{graph_text(graph)}")
    return graph


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    if not np.issubdtype(expected.dtype, np.floating):
        assert np.array_equal(actual, expected), what
        return
    a, e = actual.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(e)
    assert np.array_equal(a[~finite], e[~finite], equal_nan=True), f"{what}: NaN or infinity in other places"
    a, e = a[finite], e[finite]
    error = float(np.linalg.norm(a - e) / max(float(np.linalg.norm(e)), 1e-30))
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def kinds(graph: Graph) -> Counter[str]:
    """How many nodes of each operator there are, views left out."""
    return Counter(node.op.name for node in graph.nodes if not isinstance(node.op, ops.View))


def views(graph: Graph) -> list[ops.View]:
    return [node.op for node in graph.nodes if isinstance(node.op, ops.View)]


def only(graph: Graph, kind: type[ops.Op]) -> Node:
    """The one node of that kind."""
    (node,) = [node for node in graph.nodes if isinstance(node.op, kind)]
    return node


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape) * scale
