"""The small rewrites, each on the least graph that needs it: folding, views, expressions, literals, expansions."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.graph import Graph
from engine.ir.printer import graph_text
from engine.passes import PASSES, Traits, run
from engine.passes.fold import fold
from engine.passes.pointwise import drop_expands, inline_literals
from engine.passes.simplify import simplified, simplify
from engine.passes.views import merge_views
from tests.engine.passes.toolkit import TRAITS, check, kinds, load, model, only, random, rewritten, views

X = {"x": random(2, 3, 4)}
HEAD = "(double[n,3,4] x) => "


def test_constant_sub_graphs_are_folded() -> None:
    text = HEAD + "(double[n,3,4] y) { a = Exp(c) b = Transpose(a) d = MatMul(b, a) e = ReduceSum(d) y = Mul(x, e) }"
    graph = check(model(text, {"c": random(5, 4)}), X, (fold,))
    assert kinds(graph) == {"Pointwise": 1}


def test_scatters_of_constants_are_folded() -> None:
    nodes = 'a = ScatterND(c, i, u) b = ScatterElements<axis=1,reduction="add">(a, j, v) y = Mul(x, b)'
    text = HEAD + f"(double[n,3,4] y) {{ {nodes} }}"
    content = {"c": random(3, 4), "i": np.array([[1], [-1]]), "u": random(2, 4)}
    content |= {"j": np.array([[0, 3]]), "v": random(1, 2)}
    assert kinds(check(model(text, content), X, (fold,))) == {"Pointwise": 1}


def test_running_sums_of_constants_are_folded() -> None:
    nodes = "a = CumSum<exclusive=1>(c, axis) b = CumSum<reverse=1>(a, axis) y = Mul(x, b)"
    text = f"(double[n,40,30] x) => (double[70,40,30] y) {{ {nodes} }}"
    content = {"c": random(70, 40, 30), "axis": np.array(0)}  # too large for the frontend to fold
    assert kinds(check(model(text, content), {"x": random(1, 40, 30)}, (fold,))) == {"Pointwise": 1}


def test_large_expansions_are_not_folded() -> None:
    text = HEAD + "(double[1000,1000] y) { e = Expand(c, shape) y = Exp(e) }"
    graph = rewritten(model(text, {"c": np.array([1.0]), "shape": np.array([1000, 1000])}))
    constants = [v for node in graph.nodes for v in node.inputs if v.data is not None]
    assert sum(v.data.nbytes for v in constants if v.data is not None) < 1000


def test_a_large_constant_is_folded_where_that_makes_nothing_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.passes.fold._LARGEST", 100)
    text = """(double[n,260] x) => (double[n,260] y, double[n,520] z) { t = Transpose(c) y = MatMul(x, t)
        e = Concat<axis=1>(t, t) z = MatMul(x, e) }"""
    graph = check(model(text, {"c": random(260, 260)}), {"x": random(2, 260)}, (fold,))
    assert kinds(graph) == {"Gemm": 2, "Concat": 1}
    assert views(graph) == []


def test_equal_nodes_and_equal_constants_are_one() -> None:
    text = HEAD + "(double[n,3,4] y) { a = Mul(x, c) b = Mul(x, d) e = Exp(a) f = Exp(b) y = Add(e, f) }"
    graph = check(model(text, {"c": np.arange(4.0), "d": np.arange(4.0)}), X, (fold,))
    assert len(graph.nodes) == 3


def test_constants_that_differ_in_one_bit_stay_apart() -> None:
    c = np.arange(4.0)
    d = c.copy()
    d[0] = -0.0
    graph = check(model(HEAD + "(double[n,3,4] y) { a = Div(x, c) b = Div(x, d) y = Sub(a, b) }", {"c": c, "d": d}), X)
    assert len({value for node in graph.nodes for value in node.inputs if value.is_constant}) == 2


def test_dead_code_and_identities_go() -> None:
    text = HEAD + "(double[n,3,4] y) { a = Identity(x) dead = Exp(a) b = Relu(a) c = Identity(b) y = Identity(c) }"
    graph = check(model(text), X, (fold,))
    assert len(graph.nodes) == 1


VIEWS = {
    "two reshapes": ("a = Reshape(x, s1) y = Reshape(a, s2)", "double[n,4,3] y", 1),
    "reshape and back": ("a = Reshape(x, s1) b = Reshape(a, s0) y = Exp(b)", "double[n,3,4] y", 0),
    "two transposes": ("a = Transpose<perm=[1,2,0]>(x) y = Transpose<perm=[1,2,0]>(a)", "double[4,n,3] y", 1),
    "transpose and back": ("a = Transpose<perm=[1,2,0]>(x) b = Transpose<perm=[2,0,1]>(a) y = Exp(b)",
                           "double[n,3,4] y", 0),
    "whole slice": ("a = Slice(x, zero, many, one) y = Exp(a)", "double[n,3,4] y", 0),
    "two slices": ("a = Slice(x, one, many, one) b = Slice(a, one, two, two) y = Exp(b)", "double[n,2,1] y", 1),
    "squeeze after unsqueeze": ("a = Unsqueeze(x, one) b = Squeeze(a, one) y = Exp(b)", "double[n,3,4] y", 0),
    "expand to the same": ("s = Shape(x) a = Expand(x, s) y = Exp(a)", "double[n,3,4] y", 0),
    "gather of one index": ("a = Gather<axis=1>(x, i) y = Exp(a)", "double[n,4] y", 2),
    "reduction and unsqueeze": ("a = ReduceMean<keepdims=0>(x, two) b = Unsqueeze(a, two) y = Sub(x, b)",
                                "double[n,3,4] y", 0),
    "concat of one": ("a = Concat<axis=1>(x) y = Exp(a)", "double[n,3,4] y", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_merged(name: str) -> None:
    body, output, count = VIEWS[name]
    weights = {
        "s0": np.array([0, 3, 4]), "s1": np.array([-1, 2, 6]), "s2": np.array([-1, 4, 3]), "zero": np.array([0]),
        "many": np.array([2**31 - 1]), "one": np.array([1]), "two": np.array([2]), "i": np.array(-2),
    }  # fmt: skip
    graph = check(model(f"{HEAD}({output}) {{ {body} }}", weights), X, (fold, merge_views))
    assert len(views(graph)) == count, graph_text(graph)


def test_an_axis_that_was_merged_comes_apart_again() -> None:
    text = """(double[3,n,8] x) => (double[n,4,3,2] y) { e = Exp(x) m = Reshape(e, merged)
        t = Transpose<perm=[1,0,2]>(m) s = Reshape(t, split) y = Exp(s) }"""
    weights = {"merged": np.array([3, -1, 2]), "split": np.array([-1, 4, 3, 2])}
    graph = check(model(text, weights), {"x": random(3, 5, 8)}, (merge_views,))
    assert [type(view) for view in views(graph)] == [ops.Reshape, ops.Transpose]
    assert views(graph)[1] == ops.Transpose((1, 2, 0, 3))


def test_a_reshape_between_transposes_is_not_lost() -> None:
    text = HEAD + "(double[3,4,n] y) { a = Transpose<perm=[1,0,2]>(x) b = Reshape(a, s) y = Transpose(b) }"
    check(model(text, {"s": np.array([-1, 4, 3])}), X)


x, y = ex.Arg(0, DType.F32), ex.Arg(1, DType.F32)
i = ex.Arg(0, DType.I32)


def c(value: float) -> ex.Const:
    return ex.const(value, DType.F32)


SIMPLER = [
    (ex.apply(PointOp.MUL, x, c(1)), "%0"),
    (ex.apply(PointOp.ADD, c(0), x), "%0"),
    (ex.apply(PointOp.DIV, x, c(8)), "(%0 * 0.125)"),
    (ex.apply(PointOp.DIV, x, c(3)), "(%0 / 3)"),
    (ex.apply(PointOp.POW, x, c(2)), "(%0 * %0)"),
    (ex.apply(PointOp.POW, x, c(0.5)), "sqrt(%0)"),
    (ex.apply(PointOp.MAX, c(0), ex.apply(PointOp.MIN, x, c(6))), "min(max(%0, 0), 6)"),
    (ex.apply(PointOp.MIN, ex.apply(PointOp.MAX, ex.apply(PointOp.MAX, x, c(0)), c(-1)), c(6)), "min(max(%0, 0), 6)"),
    (ex.apply(PointOp.MUL, ex.apply(PointOp.MUL, x, c(2)), c(3)), "(%0 * 6)"),
    (ex.apply(PointOp.SUB, x, ex.apply(PointOp.NEG, y)), "(%0 + %1)"),
    (ex.cast(ex.cast(x, DType.F64), DType.F32), "%0"),
    (ex.cast(ex.cast(x, DType.F16), DType.F32), "f32(f16(%0))"),
    (ex.cast(ex.cast(i, DType.I64), DType.I32), "%0"),
    (ex.cast(ex.cast(i, DType.F32), DType.I32), "i32(f32(%0))"),
    (ex.cast(ex.cast(x, DType.BOOL), DType.F32), "f32(bool(%0))"),
    (ex.apply(PointOp.WHERE, ex.apply(PointOp.NOT, ex.apply(PointOp.LT, x, y)), x, y), "where((%0 < %1), %1, %0)"),
    (ex.apply(PointOp.MAX, ex.apply(PointOp.MIN, x, c(0)), c(6)), "max(min(%0, 0), 6)"),
    (ex.apply(PointOp.ADD, c(2), c(3)), "5"),
]


@pytest.mark.parametrize(("expression", "text"), SIMPLER, ids=[ex.to_text(e) for e, _ in SIMPLER])
def test_expressions_are_simplified(expression: ex.Expr, text: str) -> None:
    assert ex.to_text(simplified(expression)) == text


def test_mask_is_computed_before_it_is_expanded() -> None:
    text = """(int64[n,1,1,4] m) => (double[n,2,3,4] y) { e = Expand(m, shape) f = Cast<to=11>(e) g = Sub(one, f)
        y = Mul(g, low) }"""
    weights = {"shape": np.array([1, 2, 3, 4]), "one": np.array(1.0), "low": np.array(-1e9)}
    passes = (fold, drop_expands, inline_literals, simplify)
    graph = check(model(text, weights), {"m": np.ones((2, 1, 1, 4), np.int64)}, passes)
    assert isinstance(graph.nodes[-1].op, ops.Expand)
    assert graph.nodes[-2].output.shape[1:3] == (1, 1)


def test_expand_that_gives_the_shape_stays() -> None:
    text = HEAD + "(double[n,3,4] y) { s = Shape(x) e = Expand(c, s) y = Exp(e) }"
    check(model(text, {"c": random(4)}), X)


def test_scalar_of_higher_rank_keeps_the_shape() -> None:
    graph = check(model(HEAD + "(double[1,n,3,4] y) { y = Mul(x, c) }", {"c": np.full((1, 1, 1, 1), 2.0)}), X)
    assert graph.outputs[0].rank == 4


def test_passes_print_the_graph_when_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TILEWAVE_PRINT_AFTER", "fold")
    run(load(model(HEAD + "(double[n,3,4] y) { y = Relu(x) }")), TRAITS)
    text = capsys.readouterr().err
    assert text.count("# after fold") == PASSES.count(fold)
    assert "%y: f64[n, 3, 4] = Pointwise(%x) : max(%x, 0)" in text


def test_printer_shows_everything_a_reader_needs() -> None:
    text = """(double[n,3,8,8] x) => (double[n,2] y, double[n,2] z) { c = Conv<strides=[2,2]>(x, k) r = Relu(c)
        p = GlobalAveragePool(r) f = Flatten(p) m = MatMul(f, w) y = Softmax(m) z = Exp(m) }"""
    graph = rewritten(model(text, {"k": random(4, 3, 3, 3), "w": random(4, 2)}))
    lines = graph_text(graph)
    assert "order=(0, 2, 3, 1) = Conv(%x, k) {strides=(2, 2)" in lines
    assert "max(acc, 0)" in lines
    assert "output y: %y" in lines


def test_an_empty_graph_and_one_that_returns_its_input() -> None:
    graph = check(model("(double[n] x) => (double[n] y) { y = Identity(x) }"), {"x": random(3)})
    assert len(graph.nodes) <= 1
    assert isinstance(run(Graph("empty"), Traits()), Graph)


def test_two_outputs_that_are_one_value() -> None:
    text = "(double[n] x) => (double[n] y, double[n] z) { y = Exp(x) z = Exp(x) }"
    graph = check(model(text), {"x": random(3)})
    assert only(graph, ops.Pointwise).output is graph.outputs[0] is graph.outputs[1]


ROLLS = {
    "forwards": ("a = Slice(x, three, far, one) b = Slice(x, zero, three, one)", 1),
    "backwards": ("a = Slice(x, minus_two, far, one) b = Slice(x, zero, minus_two, one)", 1),
    "too short": ("a = Slice(x, three, far, one) b = Slice(x, zero, two, one)", 0),
    "the same way round": ("b = Slice(x, three, far, one) a = Slice(x, zero, three, one)", 0),
}
NUMBERS = {
    name: np.array([value])
    for name, value in {"zero": 0, "one": 1, "two": 2, "three": 3, "minus_two": -2, "far": 2**31}.items()
}


@pytest.mark.parametrize("case", ROLLS)
def test_rolls_are_wrapped_paddings(case: str) -> None:
    parts, count = ROLLS[case]
    text = f"(double[n,7,4] x) => (double[n,k,4] y) {{ {parts} c = Concat<axis=1>(a, b) y = Relu(c) }}"
    assert kinds(check(model(text, NUMBERS), {"x": random(2, 7, 4)}))["Pad"] == count


def test_rolls_along_two_axes_are_one() -> None:
    text = """(double[n,8,6,4] x) => (double[n,8,6,4] y) { a = Slice(x, three, far, one) b = Slice(x, zero, three, one)
        c = Concat<axis=1>(a, b) d = Slice(c, minus_two, far, two) e = Slice(c, zero, minus_two, two)
        f = Concat<axis=2>(d, e) y = Relu(f) }"""
    graph = check(model(text, NUMBERS), {"x": random(2, 8, 6, 4)})
    assert kinds(graph) == {"Pad": 1, "Pointwise": 1}
