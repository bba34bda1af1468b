"""Memory orders: channels-last flows through common networks, and a plan for a channels-last target needs no copies."""

from __future__ import annotations

import numpy as np
import pytest

from engine.ir import ops
from engine.ir.graph import Graph
from engine.passes import Traits
from engine.plan.build import Constants, build
from engine.plan.plan import Access, Plan, Requirement
from engine.plan.tensor import Tensor
from tests.engine.passes.toolkit import check, kinds, model, random, rewritten


class ChannelsLast:
    """A target whose convolutions and pools want the channel innermost; the rest reads anything."""

    def requirements(
        self, op: ops.Op, inputs: tuple[Tensor, ...]
    ) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
        free = tuple(Requirement() for _ in inputs)
        count = len(getattr(op, "stores", (None,)))
        if not isinstance(op, ops.Conv | ops.Pool):
            return free, (Requirement(),) * count
        rank = len(inputs[0].shape)
        last = Requirement(Access.INNER, (0, *range(2, rank), 1))
        return (last, *free[1:]), (last,) * count


def plan(graph: Graph, **sizes: int) -> Plan:
    return build(graph, sizes, ChannelsLast(), Constants())


def copies(result: Plan) -> list[str]:
    return [step.name for step in result.steps if any(mark in step.name for mark in (".layout", ".copy", "output"))]


W = {
    "k": random(8, 4, 3, 3, seed=1), "k2": random(8, 8, 3, 3, seed=2), "se": random(8, 8, 1, 1), "w": random(8, 5),
    "pad": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "twice": np.array([1.0, 1.0, 2.0, 2.0]),
    "axes": np.array([2, 3]), "b": random(8, seed=5),
}  # fmt: skip
RESIDUAL = """(double[n,4,8,8] x) => (double[n,5] y) { c = Conv<pads=[1,1,1,1]>(x, k) r = Relu(c)
    d = Conv<pads=[1,1,1,1]>(r, k2) s = Add(d, r) t = Relu(s) p = GlobalAveragePool(t) f = Flatten(p)
    y = MatMul(f, w) }"""
SQUEEZE = """(double[n,4,8,8] x) => (double[n,5] y) { c = Conv<pads=[1,1,1,1]>(x, k) r = Relu(c)
    g = GlobalAveragePool(r) h = Conv(g, se) i = Sigmoid(h) s = Mul(r, i) d = Conv<pads=[1,1,1,1]>(s, k2)
    p = GlobalAveragePool(d) f = Flatten(p) y = MatMul(f, w) }"""
DENSE = """(double[n,4,8,8] x) => (double[n,5] y) { c = Conv<pads=[1,1,1,1]>(x, k) d = Conv<pads=[1,1,1,1]>(c, k2)
    j = Concat<axis=1>(c, d) e = Sigmoid(j) q = MaxPool<kernel_shape=[2,2], strides=[2,2]>(e)
    z = Pad<mode="edge">(q, pad)
    u = Resize<mode="nearest">(z, , twice) a, o = Split<axis=1, num_outputs=2>(u) v = Conv(a, k2)
    p = GlobalAveragePool(v) f = Flatten(p) y = MatMul(f, w) }"""
LAST = """(double[n,8,8,4] x) => (double[n,5] y) { x1 = Transpose<perm=[0,3,1,2]>(x) c = Conv<pads=[1,1,1,1]>(x1, k)
    c1 = Transpose<perm=[0,2,3,1]>(c) d = Add(c1, b) r = Relu(d) r1 = Transpose<perm=[0,3,1,2]>(r)
    q = Conv<pads=[1,1,1,1]>(r1, k2) q1 = Transpose<perm=[0,2,3,1]>(q) s = Add(q1, r) t = Relu(s)
    m = ReduceMean<keepdims=0>(t, hw) y = MatMul(m, w) }"""


@pytest.mark.parametrize("name", ["RESIDUAL", "SQUEEZE", "DENSE"])
def test_common_networks_are_channels_last_without_copies(name: str) -> None:
    text = {"RESIDUAL": RESIDUAL, "SQUEEZE": SQUEEZE, "DENSE": DENSE}[name]
    graph = check(model(text, W), {"x": random(2, 4, 8, 8)})
    images = [v for node in graph.nodes if not isinstance(node.op, ops.View) for v in node.outputs if v.rank == 4]
    assert all(value.order == (0, 2, 3, 1) for value in images), images
    # Only the caller's image, which is channels-first, is rearranged.
    assert len(copies(plan(graph, n=2))) == 1


def test_a_channels_last_model_needs_no_copy_at_all() -> None:
    graph = check(model(LAST, W | {"hw": np.array([1, 2])}), {"x": random(2, 8, 8, 4)})
    assert kinds(graph) == {"Conv": 2, "Reduce": 1, "Gemm": 1}
    assert copies(plan(graph, n=2)) == []


def test_outputs_stay_row_major() -> None:
    text = "(double[n,4,8,8] x) => (double[n,8,8,8] y) { y = Conv<pads=[1,1,1,1]>(x, k) }"
    graph = check(model(text, W), {"x": random(2, 4, 8, 8)})
    assert graph.outputs[0].order is None
    assert plan(graph, n=2).outputs["y"].is_contiguous


def test_a_target_that_does_not_want_channels_last_gets_row_major() -> None:
    graph = rewritten(model(RESIDUAL, W), traits=Traits(channels_last=False))
    assert all(value.order is None for node in graph.nodes for value in node.outputs)


def test_group_norm_of_a_channels_last_image_is_a_view() -> None:
    text = """(double[n,4,8,8] x) => (double[n,8,8,8] y) { c = Conv<pads=[1,1,1,1]>(x, k) g = Reshape(c, grouped)
        i = InstanceNormalization(g, ones, zeros) s = Shape(c) u = Reshape(i, s) m = Mul(u, se1) a = Add(m, c1)
        r = Relu(a) y = Conv<pads=[1,1,1,1]>(r, k2) }"""
    weights = W | {"grouped": np.array([0, 4, -1]), "ones": np.ones(4), "zeros": np.zeros(4), "se1": random(8, 1, 1),
                   "c1": random(8, 1, 1, seed=9)}  # fmt: skip
    graph = check(model(text, weights), {"x": random(2, 4, 8, 8)}, tolerance=1e-7)
    assert kinds(graph) == {"Conv": 2, "Norm": 1}


def test_group_norm_and_silu_between_convolutions_copy_nothing() -> None:
    """The order is followed through the views that split the channels into groups; Sigmoid and Mul are one store."""
    text = """(double[n,4,8,8] x) => (double[n,5] y) { c = Conv<pads=[1,1,1,1]>(x, k) g = Reshape(c, grouped)
        i = InstanceNormalization(g, ones, zeros) s = Shape(c) u = Reshape(i, s) m = Mul(u, se1) a = Add(m, c1)
        t = Sigmoid(a) r = Mul(a, t) d = Conv<pads=[1,1,1,1]>(r, k2) p = GlobalAveragePool(d) f = Flatten(p)
        y = MatMul(f, w) }"""
    weights = W | {"grouped": np.array([0, 4, -1]), "ones": np.ones(4), "zeros": np.zeros(4), "se1": random(8, 1, 1),
                   "c1": random(8, 1, 1, seed=9)}  # fmt: skip
    graph = check(model(text, weights), {"x": random(2, 4, 8, 8)}, tolerance=1e-7)
    assert kinds(graph) == {"Conv": 2, "Norm": 1, "Reduce": 1, "Gemm": 1}
    assert copies(plan(graph, n=2)) == ["Conv_0.layout"]  # of the input


def test_a_shuffled_image_is_copied_once() -> None:
    text = """(double[n,4,8,8] x) => (double[n,5] y) { c = Conv<pads=[1,1,1,1]>(x, k) g = Reshape(c, grouped)
        t = Transpose<perm=[0,2,1,3,4]>(g) s = Reshape(t, whole) d = Conv<pads=[1,1,1,1]>(s, k2)
        p = GlobalAveragePool(d) f = Flatten(p) y = MatMul(f, w) }"""
    weights = W | {"grouped": np.array([0, 2, 4, 8, 8]), "whole": np.array([0, 8, 8, 8])}
    graph = check(model(text, weights), {"x": random(2, 4, 8, 8)})
    assert copies(plan(graph, n=2)) == ["Conv_0.layout", "Reshape_3.copy"]
