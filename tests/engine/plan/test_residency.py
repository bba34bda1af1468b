"""What a cache can hold from one use of a buffer to the next."""

from __future__ import annotations

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.ops import Pointwise
from engine.ir.ops.base import Cost
from engine.plan.plan import Plan, Step
from engine.plan.residency import cached_bytes
from engine.plan.tensor import Buffer, BufferKind, Tensor

OP = Pointwise((ex.Arg(0, DType.U8),))
IN, OUT, WEIGHT, BETWEEN = BufferKind.INPUT, BufferKind.OUTPUT, BufferKind.CONSTANT, BufferKind.ARENA


def tensor(name: str, kind: BufferKind, nbytes: int) -> Tensor:
    return Tensor(Buffer(name, kind, nbytes), DType.U8, (nbytes,), (1,))


def plan(*steps: tuple[list[Tensor], Tensor], touched: int | None = None) -> Plan:
    made = []
    for inputs, output in steps:
        nbytes = touched or sum(t.nbytes for t in (*inputs, output))
        made.append(Step(output.buffer.name, OP, tuple(inputs), (output,), Cost(0, nbytes)))
    return Plan({}, tuple(made), {}, {}, (), 0, 0)


def layers(count: int, width: int, weight: int) -> Plan:
    """x → h0 → h1 → …, each by a weight of its own."""
    values = [tensor("x", IN, width), *(tensor(f"h{i}", BETWEEN, width) for i in range(count))]
    return plan(*(([values[i], tensor(f"w{i}", WEIGHT, weight)], values[i + 1]) for i in range(count)))


def test_a_plan_that_fits_is_cached_as_a_whole() -> None:
    assert cached_bytes(layers(4, 10, 100), 450) == (120,) * 4


def test_weights_that_do_not_fit_together_come_from_memory_each_run() -> None:
    """Each would fit alone; activations go from step to step through the cache."""
    assert cached_bytes(layers(4, 10, 100), 300) == (20,) * 4


def test_no_cache_holds_nothing() -> None:
    assert cached_bytes(layers(4, 10, 100), 0) == (0,) * 4


def test_a_value_that_is_read_again_late_has_left_the_cache() -> None:
    early, big = tensor("early", BETWEEN, 10), tensor("big", BETWEEN, 500)
    x, a, b = tensor("x", IN, 10), tensor("a", BETWEEN, 10), tensor("b", OUT, 10)
    found = plan(([x], early), ([early], a), ([a], big), ([big], a), ([a, early], b))
    assert cached_bytes(found, 100) == (20, 20, 10, 10, 20)


def test_a_weight_that_is_used_twice_in_a_row_is_read_from_memory_once() -> None:
    weight, other = tensor("w", WEIGHT, 100), tensor("v", WEIGHT, 400)
    x, a, b, c = tensor("x", IN, 10), tensor("a", BETWEEN, 10), tensor("b", BETWEEN, 10), tensor("c", OUT, 10)
    assert cached_bytes(plan(([x, weight], a), ([a, weight], b), ([b, other], c)), 200) == (20, 120, 20)


def test_a_lookup_touches_a_part_of_its_table() -> None:
    """A thousand rows of the table count as the bytes of the rows that are read."""
    table, ids, out = tensor("table", WEIGHT, 100_000), tensor("ids", IN, 10), tensor("out", OUT, 40)
    (found,) = cached_bytes(plan(([table, ids], out), touched=90), 60)
    assert 0 < found < 90
