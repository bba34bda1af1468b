"""The plan builder: results equal the interpreter's whatever the views, the layouts asked for and the sizes."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import symbol
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Value, constant
from engine.plan.build import Constants, build
from engine.plan.plan import Plan
from engine.plan.tensor import BufferKind
from tests.engine import ir_interpreter
from tests.engine.plan.executor import AnyLayout, DenseOnly, execute

F32 = DType.F32
BATCH, SEQUENCE = symbol("batch"), symbol("sequence")


def relu() -> ops.Pointwise:
    return ops.Pointwise((ex.apply(ex.PointOp.MAX, ex.Arg(0, F32), ex.const(0.0)),))


def add() -> ops.Pointwise:
    return ops.Pointwise((ex.apply(ex.PointOp.ADD, ex.Arg(0, F32), ex.Arg(1, F32)),))


def graph_of(*inputs: Value) -> Graph:
    return Graph("test", inputs=list(inputs))


def finish(graph: Graph, **outputs: Value) -> Graph:
    graph.outputs, graph.output_names = list(outputs.values()), list(outputs)
    graph.validate()
    return graph


def check(graph: Graph, sizes: dict[str, int], target: AnyLayout | DenseOnly | None = None) -> Plan:
    """Build and execute; the outputs must be the interpreter's to the bit."""
    rng = np.random.default_rng(0)
    feeds = {
        value.name: rng.standard_normal(
            [dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape]
        ).astype(np.float32)
        for value in graph.inputs
    }
    plan = build(graph, sizes, target or AnyLayout(), Constants())
    outputs = execute(plan, feeds)
    expected = ir_interpreter.run(graph, feeds)
    assert outputs.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(outputs[name], array, err_msg=name)
    return plan


TARGETS = pytest.mark.parametrize("target", [AnyLayout(), DenseOnly()], ids=["any-layout", "dense-only"])


@TARGETS
def test_chain_of_views_between_steps(target: AnyLayout | DenseOnly) -> None:
    x = Value("x", F32, (BATCH, SEQUENCE, 12))
    graph = graph_of(x)
    (a,) = graph.add(relu(), [x], "a")
    (heads,) = graph.add(ops.Reshape((BATCH, SEQUENCE, 3, 4)), [a], "heads")
    (turned,) = graph.add(ops.Transpose((0, 2, 1, 3)), [heads], "turned")
    (b,) = graph.add(relu(), [turned], "b")
    (back,) = graph.add(ops.Transpose((0, 2, 1, 3)), [b], "back")
    (flat,) = graph.add(ops.Reshape((BATCH, SEQUENCE, 12)), [back], "flat")
    plan = check(finish(graph, y=flat), {"batch": 2, "sequence": 5}, target)
    if isinstance(target, AnyLayout):
        assert len(plan.steps) == 2
        assert plan.steps[-1].outputs[0].buffer.kind is BufferKind.OUTPUT


def test_reshape_that_strides_cannot_express_is_copied_once() -> None:
    x = Value("x", F32, (4, 6))
    graph = graph_of(x)
    (turned,) = graph.add(ops.Transpose((1, 0)), [x], "turned")
    (flat,) = graph.add(ops.Reshape((24,)), [turned], "flat")
    (y,) = graph.add(relu(), [flat], "y")
    plan = check(finish(graph, y=y), {})
    assert [step.op.name for step in plan.steps] == ["Pointwise", "Pointwise"]


def test_two_readers_of_a_layout_share_the_copy() -> None:
    x = Value("x", F32, (4, 6))
    graph = graph_of(x)
    (turned,) = graph.add(ops.Transpose((1, 0)), [x], "turned")
    (a,) = graph.add(ops.Softmax(0), [turned], "a")
    (b,) = graph.add(ops.Softmax(1), [turned], "b")
    plan = check(finish(graph, a=a, b=b), {}, DenseOnly())
    assert [step.op.name for step in plan.steps] == ["Pointwise", "Softmax", "Softmax"]


@TARGETS
def test_concat_parts_are_written_in_place(target: AnyLayout | DenseOnly) -> None:
    x = Value("x", F32, (BATCH, 3, 5))
    graph = graph_of(x)
    (a,) = graph.add(relu(), [x], "a")
    (b,) = graph.add(add(), [x, a], "b")
    (joined,) = graph.add(ops.Concat(1), [a, b], "joined")
    (again,) = graph.add(ops.Concat(1), [joined, x], "again")
    (y,) = graph.add(relu(), [again], "y")
    plan = check(finish(graph, y=y, j=joined), {"batch": 2}, target)
    if isinstance(target, AnyLayout):
        # a, b, the copies of the input and of the output "j", y: `joined` lives inside `again`.
        assert len(plan.steps) == 5


@pytest.mark.parametrize("batch", [1, 2])
def test_patches_are_written_behind_a_token_in_place(batch: int) -> None:
    """Through a reshape and a transposition; with one image the batch axis has another stride on that way."""
    x = Value("x", F32, (BATCH, 3, 2, 2))
    graph = graph_of(x)
    (a,) = graph.add(relu(), [x], "a")
    (flat,) = graph.add(ops.Reshape((BATCH, 3, 4)), [a], "flat")
    (turned,) = graph.add(ops.Transpose((0, 2, 1)), [flat], "turned")
    (token,) = graph.add(ops.Undefined((BATCH, 1, 3)), [turned], "token")
    (joined,) = graph.add(ops.Concat(1), [token, turned], "joined")
    (part,) = graph.add(ops.Slice((0, 1, 0), (BATCH, 4, 3), (1, 1, 1)), [joined], "part")
    (y,) = graph.add(relu(), [part], "y")
    assert len(check(finish(graph, y=y), {"batch": batch}).steps) == 2


def test_growing_concats_share_one_buffer() -> None:
    """As in a DenseNet: every layer reads all that came before it."""
    x = Value("x", F32, (BATCH, 3, 5))
    graph = graph_of(x)
    parts = list(graph.add(relu(), [x], "stem"))
    for i in range(4):
        value = parts[0]
        if len(parts) > 1:
            (value,) = graph.add(ops.Concat(1), parts, f"joined{i}")
        parts += graph.add(relu(), [value], f"layer{i}")
    (last,) = graph.add(ops.Concat(1), parts, "last")
    (y,) = graph.add(relu(), [last], "y")
    plan = check(finish(graph, y=y), {"batch": 2})
    assert len(plan.steps) == 6  # the stem, four layers, y


def test_a_copied_reshape_is_laid_out_as_its_readers_want() -> None:
    """A channel shuffle of a channels-last image: one copy, and the result is channels-last again."""
    x = Value("x", F32, (BATCH, 6, 4, 4))
    graph = graph_of(x)
    (image,) = graph.add(relu(), [x], "image")
    image.order = (0, 2, 3, 1)
    (split,) = graph.add(ops.Reshape((BATCH, 2, 3, 4, 4)), [image], "split")
    (turned,) = graph.add(ops.Transpose((0, 2, 1, 3, 4)), [split], "turned")
    (shuffled,) = graph.add(ops.Reshape((BATCH, 6, 4, 4)), [turned], "shuffled")
    shuffled.order = (0, 2, 3, 1)
    (y,) = graph.add(relu(), [shuffled], "y")
    plan = check(finish(graph, y=y), {"batch": 2})
    assert [step.name for step in plan.steps] == ["image", "shuffled.copy", "y"]
    assert plan.steps[-1].inputs[0].is_contiguous_in((0, 2, 3, 1))


def test_the_same_value_twice_in_a_concat() -> None:
    x = Value("x", F32, (2, 3))
    graph = graph_of(x)
    (a,) = graph.add(relu(), [x], "a")
    (joined,) = graph.add(ops.Concat(0), [a, a], "joined")
    check(finish(graph, y=joined), {})


def test_outputs_that_are_inputs_constants_views_and_repeated() -> None:
    x = Value("x", F32, (2, 3))
    graph = graph_of(x)
    (a,) = graph.add(relu(), [x], "a")
    (turned,) = graph.add(ops.Transpose((1, 0)), [a], "turned")
    (row,) = graph.add(ops.Slice((1, 0), (1, 3), (1, 1)), [a], "row")
    (wide,) = graph.add(ops.Expand((4, 3)), [row], "wide")
    c = constant("c", np.arange(6, dtype=np.float32))
    check(finish(graph, x2=x, c2=c, a=a, a2=a, turned=turned, wide=wide), {})


def test_negative_steps_and_zero_sized_results() -> None:
    x = Value("x", F32, (BATCH, 6))
    graph = graph_of(x)
    (back,) = graph.add(ops.Slice((0, 5), (BATCH, 3), (1, -2)), [x], "back")
    (nothing,) = graph.add(ops.Slice((0, 0), (0, 6), (1, 1)), [x], "nothing")
    (y,) = graph.add(relu(), [back], "y")
    (z,) = graph.add(relu(), [nothing], "z")
    check(finish(graph, y=y, z=z), {"batch": 3})


def test_orders_lay_tensors_out_without_changing_results() -> None:
    x = Value("x", F32, (2, 3, 4, 5))
    graph = graph_of(x)
    (a,) = graph.add(relu(), [x], "a")
    a.order = (0, 2, 3, 1)
    (b,) = graph.add(relu(), [a], "b")
    b.order = (0, 2, 3, 1)
    (pooled,) = graph.add(ops.Reduce(ops.ReduceKind.MAX, (2, 3), True), [b], "pooled")
    (flat,) = graph.add(ops.Reshape((2, 3)), [pooled], "flat")
    plan = check(finish(graph, y=flat), {})
    assert len(plan.steps) == 3
    assert plan.steps[0].outputs[0].strides == (60, 1, 15, 3)


def test_sizes_that_contradict_the_graph_are_named() -> None:
    x = Value("x", F32, (BATCH, SEQUENCE))
    graph = graph_of(x)
    table = constant("table", np.zeros((8, 1), np.float32))
    (positions,) = graph.add(ops.Reshape((8,)), [table], "positions")
    graph.add(add(), [x, positions], "sum", origin="/embeddings/Add")
    finish(graph, y=graph.nodes[-1].output)
    check(graph, {"batch": 2, "sequence": 8})
    with pytest.raises(ShapeError, match="/embeddings/Add"):
        build(graph, {"batch": 2, "sequence": 9}, AnyLayout(), Constants())


def test_a_slice_past_the_end_is_named() -> None:
    graph = graph_of(Value("x", F32, (SEQUENCE,)))
    table = constant("table", np.zeros((8,), np.float32))
    (rows,) = graph.add(ops.Slice((0,), (SEQUENCE,), (1,)), [table], "rows", origin="/position/Slice")
    (y,) = graph.add(add(), [graph.inputs[0], rows], "y")
    finish(graph, y=y)
    check(graph, {"sequence": 7})
    with pytest.raises(ShapeError, match="/position/Slice"):
        build(graph, {"sequence": 9}, AnyLayout(), Constants())


def test_size_tensors_are_made_when_the_plan_is() -> None:
    x = Value("x", F32, (BATCH, SEQUENCE))
    graph = graph_of(x)
    (sizes,) = graph.add(ops.ShapeTensor((2,), (BATCH, SEQUENCE * 2)), [], "sizes")
    (numbers,) = graph.add(ops.ShapeTensor((SEQUENCE,), None), [], "numbers")
    plan = check(finish(graph, s=sizes, n=numbers, x2=x), {"batch": 2, "sequence": 5})
    assert all(step.cost.flops == 0 for step in plan.steps)


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs_of_views_and_steps(seed: int) -> None:
    """Random chains of views, steps and concatenations give what the interpreter gives, under both kinds of target."""
    rng = np.random.default_rng(seed)
    x = Value("x", F32, (2, 3, 4))
    graph = graph_of(x)
    values = [x]
    for index in range(14):
        value = values[rng.integers(len(values))]
        values.extend(graph.add(*random_op(rng, value, values), name=f"v{index}"))
    outputs = {f"o{i}": values[int(n)] for i, n in enumerate(rng.integers(1, len(values), 4))}
    finish(graph, **outputs)
    graph.remove_dead()
    check(graph, {}, AnyLayout())
    plan = check(graph, {}, DenseOnly())
    assert plan.arena_bytes <= plan.unshared_bytes


def random_op(rng: np.random.Generator, value: Value, values: list[Value]) -> tuple[ops.Op, list[Value]]:
    shape = [int(dim) for dim in value.shape if isinstance(dim, int)]
    match rng.integers(7):
        case 0:
            return ops.Transpose(tuple(int(i) for i in rng.permutation(len(shape)))), [value]
        case 1:
            total = int(np.prod(shape))
            first = int(rng.choice([d for d in range(1, total + 1) if total % d == 0]))
            return ops.Reshape((first, total // first)), [value]
        case 2:
            sizes = [int(rng.integers(1, dim + 1)) for dim in shape]
            starts = [int(rng.integers(0, dim - size + 1)) for dim, size in zip(shape, sizes, strict=True)]
            return ops.Slice(tuple(starts), tuple(sizes), (1,) * len(shape)), [value]
        case 3:
            return ops.Expand((2, *shape) if len(shape) < 4 else tuple(shape)), [value]
        case 4:
            same = [v for v in values if v.shape == value.shape]
            return ops.Concat(int(rng.integers(len(shape)))), [value, same[rng.integers(len(same))]]
        case 5:
            same = [v for v in values if v.shape == value.shape]
            return add(), [value, same[rng.integers(len(same))]]
        case _:
            return relu(), [value]
