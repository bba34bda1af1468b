"""What an operator function receives: the ONNX node's attributes, and the ways to add IR nodes for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import onnx

from engine.errors import ModelError, UnsupportedOp
from engine.frontend.builder import Builder
from engine.frontend.formula import Term
from engine.frontend.tensors import Source, tensor_array
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import Dim, Sym
from engine.ir.dtype import DType
from engine.ir.graph import Value
from engine.ir.ops.base import broadcast_shapes

Array = np.ndarray[Any, Any]
AttributeType = onnx.AttributeProto
T = TypeVar("T")

_WIDE_FLOATS = frozenset({DType.F32, DType.F64})


class OnnxNode:
    """One node of the model while it is translated.

    `where` names it in messages; `version` is the opset version of its domain; `outputs` its output names ("" where
    the model does not use one); `inline(attribute, values, label)` translates the subgraph in an attribute in place,
    with `values` as its inputs, and gives its outputs; `label` keeps the names of repeated subgraphs apart.
    """

    def __init__(
        self,
        proto: onnx.NodeProto,
        attributes: dict[str, onnx.AttributeProto],
        versions: dict[str, int],
        builder: Builder,
        source: Source,
        origin: str,
        inline: Callable[[str, Sequence[Value], str], list[Value]],
    ) -> None:
        self.proto = proto
        self.op_type = proto.op_type
        self.domain = "" if proto.domain == "ai.onnx" else proto.domain
        self.versions = versions
        self.version = versions.get(self.domain, 1)
        self.outputs = tuple(proto.output)
        self.origin = origin
        self.builder = builder
        self.source = source
        self.attributes = attributes
        self.inline = inline
        self.where = f"{source.label}: node {origin!r} ({proto.op_type})"

    # --- attributes ---------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return name in self.attributes

    def _get(self, name: str, kind: Any, default: T | None, read: Callable[[Any], T]) -> T:
        attribute = self.attributes.get(name)
        if attribute is None:
            if default is None:
                raise ModelError(f"{self.where}: attribute {name!r} is missing")
            return default
        if attribute.type != kind:
            wanted = AttributeType.AttributeType.Name(kind)
            raise ModelError(f"{self.where}: attribute {name!r} is not of type {wanted}; the file is damaged")
        return read(attribute)

    def integer(self, name: str, default: int | None = None) -> int:
        return self._get(name, AttributeType.INT, default, lambda attribute: int(attribute.i))

    def number(self, name: str, default: float | None = None) -> float:
        return self._get(name, AttributeType.FLOAT, default, lambda attribute: float(attribute.f))

    def text(self, name: str, default: str | None = None) -> str:
        return self._get(name, AttributeType.STRING, default, lambda attribute: attribute.s.decode("utf-8", "replace"))

    def choice(self, name: str, default: str, *others: str) -> str:
        """A string attribute that must be `default` or one of `others`."""
        text = self.text(name, default)
        if text not in (default, *others):
            raise self.unsupported(f"attribute {name} = {text!r}")
        return text

    def integers(self, name: str, default: Sequence[int] | None = None) -> tuple[int, ...]:
        given = None if default is None else tuple(default)
        return self._get(name, AttributeType.INTS, given, lambda attribute: tuple(attribute.ints))

    def numbers(self, name: str, default: Sequence[float] | None = None) -> tuple[float, ...]:
        given = None if default is None else tuple(default)
        return self._get(name, AttributeType.FLOATS, given, lambda attribute: tuple(attribute.floats))

    def tensor(self, name: str) -> Array:
        proto: onnx.TensorProto = self._get(name, AttributeType.TENSOR, None, lambda attribute: attribute.t)
        return self.array(proto, name)

    def array(self, proto: onnx.TensorProto, name: str) -> Array:
        """The content of a tensor inside attribute `name`."""
        return tensor_array(proto, self.source, f"{self.where}: attribute {name!r}")

    # --- errors -------------------------------------------------------------------------------------------------------

    def unsupported(self, what: str) -> UnsupportedOp:
        """The error for something that ONNX allows and the engine cannot do."""
        return UnsupportedOp(f"{self.where}: {what} is not supported")

    def invalid(self, what: str) -> ModelError:
        """The error for something that ONNX does not allow."""
        return ModelError(f"{self.where}: {what}")

    # --- what is known while reading ----------------------------------------------------------------------------------

    def axis(self, axis: int, rank: int) -> int:
        """`axis`, counted from the end where negative, checked against `rank`."""
        if not -rank <= axis < rank:
            raise self.invalid(f"axis {axis} of a tensor of rank {rank}")
        return axis % rank

    def axes(self, axes: Sequence[int], rank: int) -> tuple[int, ...]:
        """Axes in ascending order, without repetition."""
        found = tuple(sorted({self.axis(axis, rank) for axis in axes}))
        if len(found) != len(axes):
            raise self.invalid(f"axes {list(axes)} of a tensor of rank {rank}: one is named twice")
        return found

    def dims(self, value: Value, what: str) -> list[Dim]:
        """The integers in a small tensor, symbolic where they depend on the inputs' shapes."""
        if value.dtype is not DType.I64 and value.dtype is not DType.I32:
            raise self.invalid(f"{what} of type {value.dtype.value} instead of int64")
        known = self.builder.content(value)
        if known is None:
            raise self.unsupported(f"{what} computed from data ({value.name or 'unnamed'!r}: it decides a shape)")
        if not all(isinstance(element, (int, np.integer, Sym)) for element in known.flat):
            raise self.invalid(f"{what} must be integers")
        return [element if isinstance(element, Sym) else int(element) for element in known.flat]

    def static_ints(self, value: Value, what: str) -> list[Any]:
        """The integers in a small tensor that depend on nothing."""
        dims = self.dims(value, what)
        if any(isinstance(dim, Sym) for dim in dims):
            raise self.unsupported(f"{what} that depends on the inputs' shapes ({', '.join(map(str, dims))})")
        return dims

    def known(self, value: Value) -> Array | None:
        """The numbers in `value` where all are known, else None."""
        found = value.data if value.data is not None else self.builder.content(value)
        if found is not None and found.dtype == object and value.dtype is not DType.STRING:
            return None  # sizes
        return found

    def static(self, value: Value, what: str) -> Array:
        """The numbers in `value`, which must be a constant."""
        found = self.known(value)
        if found is None:
            raise self.unsupported(f"{what} that is not a constant")
        return found

    def scalar(self, value: Value, what: str) -> Any:
        """The only element of a constant, as a Python number."""
        array = self.static(value, what)
        if array.size != 1:
            raise self.invalid(f"{what} must be one number, not {list(array.shape)}")
        return array.reshape(()).item()

    def elements(self, value: Value) -> tuple[Value, ...]:
        """The tensors of a sequence."""
        elements = self.builder.elements(value)
        if elements is None:
            raise self.invalid(f"{value.name!r} is a tensor, not a sequence")
        return elements

    # --- adding to the graph ------------------------------------------------------------------------------------------

    def add(self, op: ops.Op, *inputs: Value) -> Value:
        """The result of an op with one output."""
        (result,) = self.builder.add(op, inputs, self.origin)
        return result

    def add_all(self, op: ops.Op, *inputs: Value) -> tuple[Value, ...]:
        return self.builder.add(op, inputs, self.origin)

    def constant(self, value: Any, dtype: DType | None = None) -> Value:
        array = np.asarray(value)
        return self.builder.constant(array.astype(dtype.numpy) if dtype else array)

    def sizes(self, dims: Sequence[Dim], dtype: DType = DType.I64) -> Value:
        """A 1-D tensor of sizes."""
        return self.builder.sizes(dims, (len(dims),), dtype)

    def reshape(self, x: Value, shape: Sequence[Dim]) -> Value:
        return x if tuple(shape) == x.shape else self.add(ops.Reshape(tuple(shape)), x)

    def transpose(self, x: Value, perm: Sequence[Any]) -> Value:
        return x if tuple(perm) == tuple(range(x.rank)) else self.add(ops.Transpose(tuple(perm)), x)

    def expand(self, x: Value, shape: Sequence[Dim]) -> Value:
        return x if tuple(shape) == x.shape else self.add(ops.Expand(tuple(shape)), x)

    def cast(self, x: Value, dtype: DType) -> Value:
        return x if x.dtype is dtype else self.pointwise(lambda term: term.cast(dtype), x)

    @overload
    def pointwise(self, formula: Callable[[Term], Term], a: Value, /) -> Value: ...
    @overload
    def pointwise(self, formula: Callable[[Term, Term], Term], a: Value, b: Value, /) -> Value: ...
    @overload
    def pointwise(self, formula: Callable[[Term, Term, Term], Term], a: Value, b: Value, c: Value, /) -> Value: ...
    @overload
    def pointwise(self, formula: Callable[..., Term], /, *values: Value) -> Value: ...
    def pointwise(self, formula: Callable[..., Term], *values: Value) -> Value:
        """`formula` of the broadcast values. Constants of one element become literals; broadcasts are looked through,
        so that nothing is computed twice: the result is broadcast instead where it has to be."""
        shape = broadcast_shapes("operands", *(value.shape for value in values))
        narrow = [self._before_expand(value) for value in values]
        terms, operands = self._operands(narrow)
        root = formula(*terms).expr
        used = ex.arguments(root)
        if not used:
            result = self.constant(ex.evaluate(root, []))
        elif isinstance(root, ex.Arg):
            result = operands[root.index]
        else:
            root = ex.renumber(root, {old: new for new, old in enumerate(used)})
            result = self.add(ops.Pointwise((root,)), *(operands[i] for i in used))
        return self.expand(result, shape)

    def _before_expand(self, value: Value) -> Value:
        """The value that a broadcast repeats, with its axes aligned at the end."""
        maker = self.builder.maker(value)
        while maker is not None and isinstance(maker.op, ops.Expand):
            value = maker.inputs[0]
            maker = self.builder.maker(value)
        return value

    def _literal(self, value: Value) -> ex.Const | None:
        """The number that all elements of a constant are."""
        if value.data is None or value.dtype is DType.STRING:
            return None
        if value.data.size == 1:
            return ex.const(value.data.reshape(()).item(), value.dtype)
        pattern = self.builder.grid(value)
        return ex.const(pattern, value.dtype) if isinstance(pattern, (bool, int, float)) else None

    def _operands(self, values: Sequence[Value]) -> tuple[list[Term], list[Value]]:
        """A term per value, and the inputs that the terms' arguments number."""
        literals = [self._literal(value) for value in values]
        anchored = None in literals  # else the values stay operands, and are folded as such
        terms: list[Term] = []
        inputs: list[Value] = []
        for value, literal in zip(values, literals, strict=True):
            if anchored and literal is not None:
                terms.append(Term(literal))
            else:
                known = next((i for i, other in enumerate(inputs) if other is value), len(inputs))
                if known == len(inputs):
                    inputs.append(value)
                terms.append(Term(ex.Arg(known, value.dtype)))
        return terms, inputs

    def float_pointwise(self, formula: Callable[..., Term], *values: Value) -> Value:
        """`formula` computed in fp32 (fp64 for fp64 operands), the result rounded to the first value's dtype."""
        dtype = values[0].dtype

        def rounded(*terms: Term) -> Term:
            return formula(*(term.cast(compute_dtype(term.dtype)) for term in terms)).cast(dtype)

        return self.pointwise(rounded, *values)


def compute_dtype(dtype: DType) -> DType:
    """The dtype in which a float is accumulated and transformed: fp64 for fp64, else fp32."""
    return dtype if dtype in _WIDE_FLOATS or not dtype.is_float else DType.F32


def store(dtype: DType) -> tuple[ex.Expr, ...]:
    """The plain epilogue: the accumulator rounded to `dtype`."""
    return (ex.cast(ex.Acc(compute_dtype(dtype)), dtype),)


def source(dtype: DType) -> ex.Expr:
    """The plain prologue: the first input in its compute dtype."""
    return ex.cast(ex.Arg(0, dtype), compute_dtype(dtype))
