"""Lowers the expressions of the IR (prologues, epilogues, point-wise chains) to vector instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.errors import UnsupportedOp
from engine.ir import expr as ex
from engine.ir.expr import PointOp
from engine.targets.cpu.codegen.emit import Builder, Value, element_type, vector_type

_FLOAT_BINARY = {PointOp.ADD: "fadd", PointOp.SUB: "fsub", PointOp.MUL: "fmul", PointOp.DIV: "fdiv"}


def lower(
    builder: Builder,
    roots: Sequence[ex.Expr],
    load_arg: Callable[[int], Value],
    acc: Value | None,
    lanes: int,
) -> list[Value]:
    """The values of `roots` for `lanes` neighbouring elements (0: one element as a scalar).

    `load_arg(i)` gives the register value of `Arg(i)` (called at most once for each i), `acc` that of `Acc`. Register
    types are those of `element_type`: a bool is an i1. Sub-expressions that are shared are computed once.
    """
    done: dict[ex.Expr, Value] = {}
    for node in ex.walk(*roots):
        if isinstance(node, ex.Arg):
            done[node] = load_arg(node.index)
        elif isinstance(node, ex.Acc):
            assert acc is not None
            done[node] = acc
        elif isinstance(node, ex.Const):
            done[node] = builder.const(node.value, vector_type(element_type(node.dtype), lanes))
        else:
            done[node] = _apply(builder, node, [done[arg] for arg in node.args])
    return [done[root] for root in roots]


def _apply(builder: Builder, node: ex.Apply, operands: list[Value]) -> Value:
    if node.dtype.is_float and all(arg.dtype is node.dtype for arg in node.args):
        if node.op in _FLOAT_BINARY:
            return builder.binary(_FLOAT_BINARY[node.op], operands[0], operands[1])
        if node.op is PointOp.MIN:
            return builder.minimum(operands[0], operands[1])
        if node.op is PointOp.MAX:
            return builder.maximum(operands[0], operands[1])
        if node.op is PointOp.NEG:
            return builder.emit(f"fneg {operands[0].type} {operands[0].text}", operands[0].type)
    raise UnsupportedOp(f"{node.op.value} on {', '.join(arg.dtype.value for arg in node.args)} has no CPU code")
