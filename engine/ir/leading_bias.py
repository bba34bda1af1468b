"""A bias that a convolution's sums may begin with, found in its stores."""

from __future__ import annotations

from collections.abc import Sequence

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.ir.expr import PointOp


def leading_bias(stores: Sequence[ex.Expr]) -> tuple[ex.Apply, ex.Arg] | None:
    """The addition in fp32 that the sums go through first and for all that is stored, and the operand added; None where
    anything else is done with them."""
    uses = {node for node in ex.walk(*stores) if isinstance(node, ex.Apply) and _takes_sums(node)}
    if len(uses) != 1 or any(isinstance(store, ex.Acc) for store in stores):
        return None
    (addition,) = uses
    rest = [arg for arg in addition.args if not isinstance(arg, ex.Acc)]
    if addition.op is not PointOp.ADD or len(rest) != 1 or not addition.dtype is rest[0].dtype is DType.F32:
        return None
    added = rest[0].args[0] if isinstance(rest[0], ex.Apply) and rest[0].op is PointOp.CAST else rest[0]
    return (addition, added) if isinstance(added, ex.Arg) and added.dtype.is_float else None


def _takes_sums(node: ex.Apply) -> bool:
    return any(isinstance(arg, ex.Acc) for arg in node.args)
