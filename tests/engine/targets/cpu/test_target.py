from __future__ import annotations

import gc
import threading
import tracemalloc
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

import engine
from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp
from engine.ir.graph import Graph, Value, constant
from engine.ir.ops import Conv, Gemm, Op, Reduce, ReduceKind
from engine.plan.build import Constants, build
from engine.targets.cpu import pieces
from engine.targets.cpu import target as target_module
from engine.targets.cpu.runtime import pool
from engine.targets.cpu.target import CpuExecutable, CpuTarget
from tests.engine import ir_interpreter


def network(seed: int = 0) -> Graph:
    """Two convolutions, a mean over the image and a matrix product."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> Value:
        return constant(name, rng.standard_normal(shape).astype(np.float32))

    graph = Graph("network", inputs=[Value("image", DType.F32, (4, 3, 16, 16))])
    padded = ((1, 1), (1, 1))
    bias = ex.apply(PointOp.MAX, ex.apply(PointOp.ADD, ex.Acc(), ex.Arg(2, DType.F32)), ex.const(0.0))
    layers: list[tuple[Op, tuple[Value, ...]]] = [
        (Conv((2, 2), padded, (1, 1), stores=(bias,)), (weight("w0", 24, 3, 3, 3), weight("b0", 24, 1, 1))),
        (Conv((1, 1), padded, (1, 1), 24, stores=(bias,)), (weight("w1", 24, 1, 3, 3), weight("b1", 24, 1, 1))),
        (Reduce(ReduceKind.MEAN, (2, 3), False), ()),
        (Gemm(), (weight("w2", 24, 10),)),
    ]
    value = graph.inputs[0]
    for i, (op, weights) in enumerate(layers):
        (value,) = graph.add(op, (value, *weights), f"layer{i}")
        if len(value.shape) == 4:
            value.order = (0, 2, 3, 1)
    graph.outputs, graph.output_names = [value], ["logits"]
    return graph


def bound(graph: Graph, threads: int = 2) -> tuple[CpuTarget, CpuExecutable]:
    target = CpuTarget(threads)
    return target, target.bind(build(graph, {}, target, Constants()))


def image(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((4, 3, 16, 16)).astype(np.float32)


def run(executable: CpuExecutable, x: np.ndarray, side_by_side: bool = False) -> np.ndarray:
    out = np.full((4, 10), np.nan, np.float32)
    executable.run({"image": x}, {"logits": out}, side_by_side)
    return out


def expected(graph: Graph, x: np.ndarray) -> np.ndarray:
    return ir_interpreter.run(graph, {"image": x})["logits"]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_network_gives_what_the_interpreter_gives(threads: int) -> None:
    graph = network()
    _, executable = bound(graph, threads)
    for seed in range(3):
        x = image(seed)
        np.testing.assert_allclose(run(executable, x), expected(graph, x), rtol=1e-5, atol=1e-5)


def test_a_batch_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = network(), image()
    _, whole = bound(graph)
    monkeypatch.setattr(pieces, "last_level_cache_bytes", lambda: 40_000)
    target, parts = bound(graph)
    assert (run(parts, x) == run(whole, x)).all()
    (first, *_), (alone, *_) = parts.step_stats(), whole.step_stats()
    assert first.launches == 4
    assert first.launches * first.flops == alone.launches * alone.flops
    assert target.memory()["arena"] < 40_000


def test_plans_that_mix_the_batch_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "last_level_cache_bytes", lambda: 1)
    graph = Graph("mean", inputs=[Value("x", DType.F32, (4, 5))])
    (mean,) = graph.add(Reduce(ReduceKind.MEAN, (0,), True), graph.inputs, "mean")
    graph.outputs, graph.output_names = [mean], ["y"]
    target = CpuTarget(1)
    assert pieces.in_pieces(build(graph, {}, target, Constants())).count == 1


def test_runs_from_many_threads_do_not_mix() -> None:
    graph = network()
    _, executable = bound(graph)
    images = [image(seed) for seed in range(6)]
    answers = [expected(graph, x) for x in images]
    failures: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            close = np.allclose(run(executable, images[i]), answers[i], rtol=1e-4, atol=1e-4)
            failures.extend([] if close else [i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_plans_of_one_target_share_arena_and_weights() -> None:
    graph = network()
    target = CpuTarget(2)
    constants = Constants()
    one, two = (target.bind(build(graph, {}, target, constants)) for _ in range(2))
    run(one, image())
    before = dict(target.memory())
    run(two, image())
    assert dict(target.memory()) == before
    assert before["weights"] > 0
    target.close()
    assert set(target.memory().values()) == {0}


def test_statistics_name_steps_and_kernels() -> None:
    _, executable = bound(network())
    for _ in range(5):
        run(executable, image())
    stats = executable.step_stats()
    assert [row.kernel for row in stats] == ["conv", "depthwise", "reduce", "gemm"]
    assert [row.op for row in stats] == ["Conv", "Conv", "Reduce", "Gemm"]
    assert {row.launches for row in stats} == {5}
    assert all(row.seconds > 0 for row in stats)
    assert executable.nbytes > 0


def test_a_part_of_the_pool_has_an_arena_of_its_own_and_the_weights_of_all() -> None:
    target, executable = bound(network())
    results = [run(executable, image())]
    before = target.memory()
    results += [run(executable, image(), side_by_side=True) for _ in range(3)]
    assert all(np.array_equal(result, results[0]) for result in results)
    assert target.memory() == {"weights": before["weights"], "arena": 2 * before["arena"]}


@pytest.mark.parametrize(("others", "share"), [(0, 1.0), (1, 0.5)])
def test_time_in_a_part_of_the_pool_counts_half_while_somebody_has_the_other(others: int, share: float) -> None:
    _, executable = bound(network(), threads=4)
    run(executable, image())
    with ExitStack() as held:
        for _ in range(others):
            held.enter_context(pool().part())
        for _ in range(2):
            run(executable, image(), side_by_side=True)
    (in_part,) = executable._in_parts.values()
    part = in_part.sections[0].rows()
    whole = executable._sections[0].rows()
    assert [runs for _, runs, _ in part] == [2] * 4
    for stat, (_, _, alone), (_, _, beside) in zip(executable.step_stats(), whole, part, strict=True):
        assert stat.launches == 3
        assert stat.seconds == pytest.approx(1e-9 * (alone + share * beside), rel=1e-9)


def test_the_parts_of_the_pool_have_all_threads_together() -> None:
    for threads in range(2, 9):
        assert sum(CpuTarget(threads).part_threads(number) for number in range(2)) == threads


@pytest.mark.parametrize("wrong", ["shape", "dtype", "layout"])
def test_arrays_that_do_not_fit_are_refused(wrong: str) -> None:
    _, executable = bound(network())
    x = {
        "shape": np.zeros((4, 3, 16, 15), np.float32),
        "dtype": np.zeros((4, 3, 16, 16)),
        "layout": np.zeros((4, 3, 16, 16), np.float32).transpose(0, 1, 3, 2),
    }[wrong]
    with pytest.raises(ShapeError, match="'image'"):
        run(executable, x)


def test_threads_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CpuTarget(0)


def test_strings_pass_through_host_operators() -> None:
    """Two in a row: the strings between them cannot lie in the arena."""
    nodes = [helper.make_node("StringConcat", ["a", "b"], ["ab"]), helper.make_node("StringConcat", ["ab", "b"], ["y"])]
    names = [helper.make_tensor_value_info(name, TensorProto.STRING, ["n"]) for name in ("a", "b", "y")]
    proto = helper.make_model(
        helper.make_graph(nodes, "strings", names[:2], names[2:]), opset_imports=[helper.make_opsetid("", 20)]
    )
    proto.ir_version = 10
    with engine.load(proto.SerializeToString(), device="cpu") as model:
        feeds = {"a": np.array(["x", "yz"], object), "b": np.array(["1", "é"], object)}
        assert model.run(feeds)["y"].tolist() == ["x11", "yzéé"]


def test_attention_in_doubles_runs_in_pieces() -> None:
    """The fused kernel computes float32: products and a softmax take its place, in full precision."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, 4)) for _ in range(3))
    infos = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, [2, 5, 4]) for name in "qkvy"]
    nodes = [
        helper.make_node("Transpose", ["k"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "t"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "attention", infos[:3], infos[3:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with engine.load(proto.SerializeToString(), device="cpu") as model:
        got = model.run({"q": q, "k": k, "v": v})["y"]
    weights = np.exp(q @ k.transpose(0, 2, 1))
    np.testing.assert_allclose(got, weights / weights.sum(-1, keepdims=True) @ v, rtol=1e-12)


def test_plans_take_the_memory_they_are_counted_with(all_minilm_l6_v2: Path) -> None:
    """The bound of the plan cache bounds what the process holds, Python's objects included."""
    with engine.load(all_minilm_l6_v2 / "1" / "model.onnx", device="cpu") as model:

        def run(length: int) -> None:
            ids = np.ones((1, length), np.int64)
            model.run({"input_ids": ids, "attention_mask": ids, "token_type_ids": 0 * ids})

        run(64)
        run(1)
        gc.collect()
        counted = model.memory()["plans"]
        tracemalloc.start()
        try:
            for length in range(2, 32):
                run(length)
            gc.collect()
            held = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert held <= 1.25 * (model.memory()["plans"] - counted)


def test_a_run_takes_half_of_the_machine_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes of file can name sizes that fill any machine."""
    monkeypatch.setattr(target_module, "usable_memory_bytes", lambda: 1 << 20)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1 << 20, "n", 4])
    shape = helper.make_tensor("shape", TensorProto.INT64, [3], [1 << 20, 1, 4])
    graph = helper.make_graph([helper.make_node("Expand", ["x", "shape"], ["y"])], "g", [x], [y], [shape])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with engine.load(model.SerializeToString(), device="cpu") as loaded, pytest.raises(engine.OutOfMemory, match="'y'"):
        loaded.run({"x": np.zeros((1, 4), np.float32)})
