"""Point-wise expressions: what an epilogue, a prologue or a point-wise step computes for one element.

One expression type serves the frontend (which writes it), the passes (which compose it), the code generators of every
target (which lower it), the cost model (`flops`) and the printer. Leaves are `Arg(i)`, the i-th input of the node that
owns the expression, broadcast NumPy-style against that node's first output; `Acc()`, the value the heavy part of the
node has computed for this element (fp32 accumulator, normalised value, pooled value…); and `Const`.

Expressions are immutable and hash by structure; the same sub-expression object may be used more than once (a DAG).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from math import erf
from typing import Any, TypeAlias

import numpy as np

from engine.ir.dtype import DType


class PointOp(Enum):
    """The operations of an expression. Semantics are those of the ONNX operator of the same name unless said."""

    ADD = "add"
    SUB = "sub"
    MUL = "mul"
    DIV = "div"  # integers: truncates towards zero (C semantics, as ONNX Div)
    POW = "pow"
    MIN = "min"  # propagates NaN
    MAX = "max"  # propagates NaN
    MOD = "mod"  # sign of the divisor (ONNX Mod, fmod=0)
    FMOD = "fmod"  # sign of the dividend (ONNX Mod, fmod=1)
    NEG = "neg"
    ABS = "abs"
    SIGN = "sign"
    FLOOR = "floor"
    CEIL = "ceil"
    ROUND = "round"  # half to even
    SQRT = "sqrt"
    EXP = "exp"
    LOG = "log"
    SIN = "sin"
    COS = "cos"
    TAN = "tan"
    ASIN = "asin"
    ACOS = "acos"
    ATAN = "atan"
    SINH = "sinh"
    COSH = "cosh"
    ASINH = "asinh"
    ACOSH = "acosh"
    ATANH = "atanh"
    TANH = "tanh"
    ERF = "erf"
    SIGMOID = "sigmoid"
    AND = "and"
    OR = "or"
    XOR = "xor"
    NOT = "not"
    BITAND = "bitand"
    BITOR = "bitor"
    BITXOR = "bitxor"
    BITNOT = "bitnot"
    SHL = "shl"
    SHR = "shr"
    EQ = "eq"
    LT = "lt"
    LE = "le"
    ISNAN = "isnan"
    ISINF = "isinf"
    WHERE = "where"  # where(condition, a, b)
    CAST = "cast"  # to the dtype of the Apply node


COMPARISONS = frozenset({PointOp.EQ, PointOp.LT, PointOp.LE, PointOp.ISNAN, PointOp.ISINF})
UNARY_FLOAT = frozenset(
    {
        PointOp.SQRT, PointOp.EXP, PointOp.LOG, PointOp.SIN, PointOp.COS, PointOp.TAN, PointOp.ASIN, PointOp.ACOS,
        PointOp.ATAN, PointOp.SINH, PointOp.COSH, PointOp.ASINH, PointOp.ACOSH, PointOp.ATANH, PointOp.TANH,
        PointOp.ERF, PointOp.SIGMOID,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Arg:
    """Element of the node's input number `index`."""

    index: int
    dtype: DType


@dataclass(frozen=True)
class Acc:
    """The value that the heavy part of the node computed for this element."""

    dtype: DType = DType.F32


@dataclass(frozen=True)
class Const:
    """A literal. `value` is a Python float, int or bool."""

    value: float | int | bool
    dtype: DType

    def __eq__(self, other: object) -> bool:
        # repr() tells 0.0 from -0.0 and makes NaN equal to itself, so that structural equality is reflexive.
        return isinstance(other, Const) and (repr(self.value), self.dtype) == (repr(other.value), other.dtype)

    def __hash__(self) -> int:
        return hash((repr(self.value), self.dtype))


@dataclass(frozen=True, eq=False, repr=False)
class Apply:
    """`op` applied to `args`, giving an element of type `dtype`."""

    op: PointOp
    args: tuple[Expr, ...]
    dtype: DType
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.op, self.args, self.dtype)))

    def __repr__(self) -> str:
        # The distinct sub-expressions in a row, by number: kernels are keyed by this, and nested text would grow
        # exponentially with the depth of a DAG that shares them.
        numbers: dict[Expr, int] = {}
        parts: list[str] = []
        for node in walk(self):
            numbers[node] = len(numbers)
            if isinstance(node, Apply):
                operands = ", ".join(str(numbers[arg]) for arg in node.args)
                parts.append(f"{node.op.value}({operands}) -> {node.dtype.value}")
            else:
                parts.append(repr(node))
        return f"Apply[{'; '.join(parts)}]"

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Apply) and self._hash == other._hash and _same_structure(self, other)


Expr: TypeAlias = Arg | Acc | Const | Apply


def _same_structure(a: Expr, b: Expr) -> bool:
    """Structural equality in time linear in the distinct pairs met: shared parts are compared once."""
    pending = [(a, b)]
    seen: set[tuple[int, int]] = set()
    while pending:
        x, y = pending.pop()
        if x is y or (id(x), id(y)) in seen:
            continue
        seen.add((id(x), id(y)))
        if not isinstance(x, Apply) or not isinstance(y, Apply):
            if x != y:
                return False
        elif x.op is not y.op or x.dtype is not y.dtype or len(x.args) != len(y.args):
            return False
        else:
            pending.extend(zip(x.args, y.args, strict=True))
    return True


def apply(op: PointOp, *args: Expr) -> Expr:
    """Build `op(*args)` with the result type that follows from the operands. Casts are written with `cast`."""
    if op in COMPARISONS or op in {PointOp.AND, PointOp.OR, PointOp.XOR, PointOp.NOT}:
        return Apply(op, args, DType.BOOL)
    if op is PointOp.CAST:
        raise ValueError("write a cast with cast(expression, dtype)")
    return Apply(op, args, args[-1].dtype)


def cast(value: Expr, dtype: DType) -> Expr:
    """`value` converted to `dtype` (itself where it has that type already)."""
    if value.dtype is dtype:
        return value
    if isinstance(value, Const) and dtype is not DType.STRING:
        return const(dtype.convert(np.asarray(value.value, value.dtype.numpy)).item(), dtype)
    return Apply(PointOp.CAST, (value,), dtype)


def const(value: float | int | bool, dtype: DType = DType.F32) -> Const:
    """A literal of type `dtype`."""
    if dtype.is_float:
        return Const(float(dtype.convert(np.asarray(value, np.float64))), dtype)
    return Const(bool(value) if dtype is DType.BOOL else int(value), dtype)


def walk(*roots: Expr) -> Iterator[Expr]:
    """Every distinct sub-expression once, operands before their users."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, expanded = stack.pop()
        if node in seen:
            continue
        if expanded or not isinstance(node, Apply):
            seen.add(node)
            yield node
        else:
            stack.append((node, True))
            stack.extend((child, False) for child in reversed(node.args))


def rewrite(root: Expr, leaf: Callable[[Expr], Expr]) -> Expr:
    """`root` with every leaf replaced by `leaf(leaf)`; shared sub-expressions stay shared."""
    done: dict[Expr, Expr] = {}
    for node in walk(root):
        if isinstance(node, Apply):
            args = tuple(done[arg] for arg in node.args)
            done[node] = node if args == node.args else Apply(node.op, args, node.dtype)
        else:
            done[node] = leaf(node)
    return done[root]


def replaced(root: Expr, part: Expr, new: Expr, leaf: Callable[[Expr], Expr] = lambda leaf: leaf) -> Expr:
    """`root` with the sub-expression `part` replaced by `new`, and every leaf that is not in it by `leaf(leaf)`."""
    done: dict[Expr, Expr] = {}
    for node in walk(root):
        if node == part:
            done[node] = new
        elif isinstance(node, Apply):
            done[node] = Apply(node.op, tuple(done[arg] for arg in node.args), node.dtype)
        else:
            done[node] = leaf(node)
    return done[root]


def substitute(root: Expr, replacements: Mapping[int, Expr]) -> Expr:
    """`root` with `Arg(i)` replaced by `replacements[i]` where there is one."""
    return rewrite(root, lambda leaf: replacements.get(leaf.index, leaf) if isinstance(leaf, Arg) else leaf)


def renumber(root: Expr, mapping: Mapping[int, int]) -> Expr:
    """`root` with `Arg(i)` renamed to `Arg(mapping[i])`. Every argument must be in the mapping."""
    return rewrite(root, lambda leaf: Arg(mapping[leaf.index], leaf.dtype) if isinstance(leaf, Arg) else leaf)


def replace_acc(root: Expr, value: Expr) -> Expr:
    """`root` with the accumulator replaced by `value`."""
    return rewrite(root, lambda leaf: value if isinstance(leaf, Acc) else leaf)


@lru_cache(maxsize=4096)
def arguments(*roots: Expr) -> tuple[int, ...]:
    """The indices of the arguments read, ascending."""
    return tuple(sorted({node.index for node in walk(*roots) if isinstance(node, Arg)}))


def uses_acc(*roots: Expr) -> bool:
    return any(isinstance(node, Acc) for node in walk(*roots))


@lru_cache(maxsize=4096)
def flops(*roots: Expr) -> int:
    """Floating-point operations per element: one for each distinct arithmetic node on floats (a transcendental counts
    1)."""
    return sum(
        1
        for node in walk(*roots)
        if isinstance(node, Apply)
        and node.op not in {PointOp.CAST, PointOp.WHERE}
        and any(arg.dtype.is_float for arg in node.args)
    )


def evaluate(root: Expr, args: Sequence[np.ndarray | None], acc: np.ndarray | None = None) -> np.ndarray:
    """NumPy evaluation with broadcasting: the reference for tests, and what constant folding runs.

    `args[i]` is the array for `Arg(i)` (None where unused), `acc` the one for `Acc`. The result has the expression's
    dtype.
    """
    done: dict[Expr, np.ndarray] = {}
    with np.errstate(all="ignore"):
        for node in walk(root):
            if isinstance(node, Arg):
                value = args[node.index]
                assert value is not None
                done[node] = np.asarray(value)
            elif isinstance(node, Acc):
                assert acc is not None
                done[node] = np.asarray(acc)
            elif isinstance(node, Const):
                done[node] = np.asarray(node.value, node.dtype.numpy)
            else:
                operands = [done[arg] for arg in node.args]
                done[node] = node.dtype.convert(np.asarray(_evaluate_one(node, operands)))
    return done[root]


def _evaluate_one(node: Apply, operands: list[np.ndarray]) -> Any:
    if node.op is PointOp.DIV and node.dtype.is_int:
        a, b = np.broadcast_arrays(*operands)
        safe = np.where(b == 0, 1, b)
        return np.where(b == 0, 0, (np.abs(a) // np.abs(safe)) * np.sign(a) * np.sign(safe))
    if node.op is PointOp.ERF:
        return _erf(operands[0])
    return _NUMPY_OPS[node.op](*operands)


def _erf(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.vectorize(erf, otypes=[np.float64])(x.astype(np.float64))
    return result


def _sigmoid(x: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(x))
    result: np.ndarray = np.where(x >= 0, 1 / (1 + e), e / (1 + e))
    return result


_NUMPY_OPS: dict[PointOp, Callable[..., Any]] = {
    PointOp.ADD: np.add,
    PointOp.SUB: np.subtract,
    PointOp.MUL: np.multiply,
    PointOp.DIV: np.divide,
    PointOp.POW: np.power,
    PointOp.MIN: np.minimum,
    PointOp.MAX: np.maximum,
    PointOp.MOD: np.mod,
    PointOp.FMOD: np.fmod,
    PointOp.NEG: np.negative,
    PointOp.ABS: np.abs,
    PointOp.SIGN: np.sign,
    PointOp.FLOOR: np.floor,
    PointOp.CEIL: np.ceil,
    PointOp.ROUND: np.rint,
    PointOp.SQRT: np.sqrt,
    PointOp.EXP: np.exp,
    PointOp.LOG: np.log,
    PointOp.SIN: np.sin,
    PointOp.COS: np.cos,
    PointOp.TAN: np.tan,
    PointOp.ASIN: np.arcsin,
    PointOp.ACOS: np.arccos,
    PointOp.ATAN: np.arctan,
    PointOp.SINH: np.sinh,
    PointOp.COSH: np.cosh,
    PointOp.ASINH: np.arcsinh,
    PointOp.ACOSH: np.arccosh,
    PointOp.ATANH: np.arctanh,
    PointOp.TANH: np.tanh,
    PointOp.SIGMOID: _sigmoid,
    PointOp.AND: np.logical_and,
    PointOp.OR: np.logical_or,
    PointOp.XOR: np.logical_xor,
    PointOp.NOT: np.logical_not,
    PointOp.BITAND: np.bitwise_and,
    PointOp.BITOR: np.bitwise_or,
    PointOp.BITXOR: np.bitwise_xor,
    PointOp.BITNOT: np.bitwise_not,
    PointOp.SHL: np.left_shift,
    PointOp.SHR: np.right_shift,
    PointOp.EQ: np.equal,
    PointOp.LT: np.less,
    PointOp.LE: np.less_equal,
    PointOp.ISNAN: np.isnan,
    PointOp.ISINF: np.isinf,
    PointOp.WHERE: np.where,
    PointOp.CAST: lambda x: x,
}


_INFIX = {PointOp.ADD: "+", PointOp.SUB: "-", PointOp.MUL: "*", PointOp.DIV: "/", PointOp.EQ: "==", PointOp.LT: "<",
          PointOp.LE: "<="}  # fmt: skip


_LONGEST_TEXT = 2000
"""Characters of a printed expression: sharing can make the text of a small expression astronomically long."""


def to_text(root: Expr, names: Sequence[str] | None = None) -> str:
    """A readable form such as ``min(max(acc + %2, 0), 6)``; `names[i]` replaces the default ``%i`` of an argument.

    Parts whose own text is too long are printed as ``…``.
    """
    texts: dict[Expr, str] = {}
    for node in walk(root):
        text = _text_of(node, [texts[arg] for arg in node.args] if isinstance(node, Apply) else [], names)
        texts[node] = text if len(text) <= _LONGEST_TEXT else "…"
    return texts[root]


def _text_of(node: Expr, parts: Sequence[str], names: Sequence[str] | None) -> str:
    if isinstance(node, Arg):
        return names[node.index] if names else f"%{node.index}"
    if isinstance(node, Acc):
        return "acc"
    if isinstance(node, Const):
        return f"{node.value:g}" if isinstance(node.value, float) else str(node.value).lower()
    if node.op in _INFIX:
        return f"({parts[0]} {_INFIX[node.op]} {parts[1]})"
    name = node.dtype.value if node.op is PointOp.CAST else node.op.value
    return f"{name}({', '.join(parts)})"
