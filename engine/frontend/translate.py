"""ModelProto → Graph: walks the nodes in order, calling the function of each operator. For `engine.frontend.read`.

Names are resolved through scopes: the graph's, one for each inlined subgraph (which sees the names around it), and one
for each call of a local function (which does not). Nodes that no output needs are skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx

import engine.frontend.operators  # noqa: F401  (registers the operators)
from engine.errors import EngineError, ModelError, UnsupportedOp
from engine.frontend import foreign
from engine.frontend.builder import Builder
from engine.frontend.onnx_node import OnnxNode
from engine.frontend.reader import check_opsets, opset_versions
from engine.frontend.registry import Operator, Results, find
from engine.frontend.tensors import Source, dtype_of, tensor_array
from engine.ir.dim import Dim, symbol
from engine.ir.dtype import DType
from engine.ir.graph import Graph, Value

_MAX_DEPTH = 32  # subgraphs in subgraphs, functions calling functions
# Operators whose functions take strings: views, whole copies, and those that look. No kernel touches a string, so the
# others run on the host.
_ON_STRINGS = frozenset(
    {
        "Cast", "CastLike", "Concat", "Equal", "Expand", "Flatten", "Identity", "If", "Loop", "Reshape", "Scan",
        "SequenceConstruct", "SequenceInsert", "Shape", "Size", "Slice", "Split", "SplitToSequence", "Squeeze",
        "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
_MAX_NODES = 100_000  # of functions and loops unfolded: a file of a few kilobytes must not become a graph without end


@dataclass
class Scope:
    """The names visible to some nodes. `prefix` keeps the names of inlined nodes apart."""

    versions: dict[str, int]
    values: dict[str, Value | None] = field(default_factory=dict)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    attributes: dict[str, onnx.AttributeProto] = field(default_factory=dict)
    parent: Scope | None = None
    prefix: str = ""
    depth: int = 0


class Translator:
    """One reading of one model. `symbols` renames symbols (see `unify.py`)."""

    def __init__(self, model: onnx.ModelProto, source: Source, symbols: Mapping[str, str]) -> None:
        self.model = model
        self.source = source
        self.symbols = symbols
        self.builder = Builder(model.graph.name)
        self.functions = {(f.domain, f.name): f for f in model.functions}
        self.nodes = 0

    def run(self) -> Graph:
        proto = self.model.graph
        scope = Scope(opset_versions(self.model.opset_import))
        self._initializers(proto, scope)
        for info in proto.input:
            if info.name in scope.values:
                raise ModelError(f"{self.source.label}: two graph inputs are called {info.name!r}")
            if info.name not in scope.initializers:
                scope.values[info.name] = self._input(info)
        names = [info.name for info in proto.output]
        if len(set(names)) != len(names):
            raise ModelError(f"{self.source.label}: two graph outputs have the same name")
        self._translate(proto.node, names, scope, scope.values.keys() | scope.initializers.keys())
        return self.builder.finish([(name, self._tensor(scope, name, "graph output")) for name in names])

    # --- inputs and names ---------------------------------------------------------------------------------------------

    def _input(self, info: onnx.ValueInfoProto) -> Value:
        what = f"{self.source.label}: input {info.name!r}"
        kind = info.type.WhichOneof("value")
        if not info.name:
            raise ModelError(f"{what} has no name; the file is damaged")
        if kind != "tensor_type":
            raise UnsupportedOp(f"{what} is a {kind or 'value without a type'}; only tensors are supported")
        tensor = info.type.tensor_type
        if not tensor.HasField("shape"):
            raise UnsupportedOp(f"{what} has no shape, not even a rank; export the model with one")
        dims = [self._dim(info.name, axis, dim) for axis, dim in enumerate(tensor.shape.dim)]
        return self.builder.input(info.name, dtype_of(tensor.elem_type, what), tuple(dims))

    def _dim(self, name: str, axis: int, dim: Any) -> Dim:
        if dim.WhichOneof("value") == "dim_value" and dim.dim_value >= 0:
            return int(dim.dim_value)
        called = dim.dim_param or generated_symbol(name, axis)
        return symbol(self.symbols.get(called, called))

    def _initializers(self, proto: onnx.GraphProto, scope: Scope) -> None:
        for tensor in proto.initializer:
            if not tensor.name or tensor.name in scope.initializers:
                raise ModelError(f"{self.source.label}: two initializers are called {tensor.name!r}")
            scope.initializers[tensor.name] = tensor
        for sparse in proto.sparse_initializer:
            raise UnsupportedOp(
                f"{self.source.label}: initializer {sparse.values.name!r} is sparse; save it as a dense tensor"
            )

    def _find(self, scope: Scope | None, name: str) -> Value | None:
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            tensor = scope.initializers.get(name)
            if tensor is not None:
                array = tensor_array(tensor, self.source, f"{self.source.label}: initializer {name!r}")
                scope.values[name] = self.builder.constant(array, scope.prefix + name)
                return scope.values[name]
            scope = scope.parent
        raise ModelError(f"{self.source.label}: {name!r} is read but nothing computes it; the file is damaged")

    def _tensor(self, scope: Scope, name: str, what: str) -> Value:
        value = self._find(scope, name)
        if value is None:
            raise ModelError(f"{self.source.label}: {what} {name!r} is left out by the node that should compute it")
        return value

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _translate(
        self, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], scope: Scope, known: Iterable[str]
    ) -> None:
        if scope.depth > _MAX_DEPTH:
            raise ModelError(f"{self.source.label}: {scope.prefix!r}: nested or recursive deeper than {_MAX_DEPTH}")
        for index, proto in needed(in_order(nodes, set(known), self.source.label), outputs):
            self.nodes += scope.depth > 0
            if self.nodes > _MAX_NODES:
                raise ModelError(f"{self.source.label}: more than {_MAX_NODES} nodes once functions are unfolded")
            self._node(proto, scope, f"{scope.prefix}{proto.name or f'{proto.op_type}_{index}'}")

    def _node(self, proto: onnx.NodeProto, scope: Scope, origin: str) -> None:
        def inline(attribute: str, values: Sequence[Value], label: str) -> list[Value]:
            return self._inline(node, attribute, values, scope, f"{node.origin}/{label}")

        node = OnnxNode(proto, _attributes(proto, scope), scope.versions, self.builder, self.source, origin, inline)
        inputs = [self._find(scope, name) if name else None for name in proto.input]
        while inputs and inputs[-1] is None:
            inputs.pop()
        try:
            results = self._results(node, inputs, scope)
        except (ModelError, UnsupportedOp) as error:
            if origin in str(error):
                raise
            raise type(error)(f"{node.where}: {error}") from error
        except EngineError as error:
            raise ModelError(f"{node.where}: {error}") from error
        except Exception as error:  # a hostile file may ask for anything; what it asked for is in the message
            raise ModelError(f"{node.where}: cannot be read: {type(error).__name__}: {error}") from error
        results = [results] if isinstance(results, Value) else list(results)
        for name, value in zip(proto.output, results, strict=False):
            if name:
                scope.values[name] = value
                if value is not None:
                    self.builder.name(value, scope.prefix + name)
        for name in proto.output[len(results) :]:
            if name:
                scope.values[name] = None

    def _results(self, node: OnnxNode, inputs: list[Value | None], scope: Scope) -> Results:
        function = self.functions.get((node.proto.domain, node.op_type))
        if function is not None:
            return self._call(node, function, inputs, scope, opset_versions(function.opset_import))
        operator = find(node.domain, node.op_type, node.version)
        if node.op_type not in _ON_STRINGS and any(map(self._is_strings, inputs)) and foreign.is_known(node):
            return foreign.opaque(node, inputs)
        if operator is not None:
            _check_inputs(node, operator, inputs)
            return operator(node, inputs)
        if foreign.is_known(node):
            body = foreign.function_body(node, inputs)
            if body is not None:
                node.attributes = foreign.default_attributes(node) | node.attributes
                return self._call(node, body, inputs, scope, node.versions)
            return foreign.opaque(node, inputs)
        raise UnsupportedOp(
            f"{node.where}: there is no operator {node.op_type!r} in domain {node.domain or 'ai.onnx'!r} version "
            f"{node.version} of the installed onnx ({onnx.__version__}); export the model with standard operators"
        )

    def _is_strings(self, value: Value | None) -> bool:
        return value is not None and value.dtype is DType.STRING and self.builder.elements(value) is None

    # --- subgraphs and functions --------------------------------------------------------------------------------------

    def _call(
        self,
        node: OnnxNode,
        function: onnx.FunctionProto,
        inputs: Sequence[Value | None],
        scope: Scope,
        versions: dict[str, int],
    ) -> list[Value | None]:
        if "" in versions:
            check_opsets(versions, f"{self.source.label}: function {function.name!r}")
        if len(inputs) > len(function.input):
            raise node.invalid(f"{len(inputs)} inputs for a function of {len(function.input)}")
        attributes = {attribute.name: attribute for attribute in function.attribute_proto} | node.attributes
        inner = Scope(versions, attributes=attributes, prefix=f"{node.origin}/", depth=scope.depth + 1)
        missing = [None] * (len(function.input) - len(inputs))
        inner.values.update(zip(function.input, [*inputs, *missing], strict=True))
        wanted = [name for name, used in zip(function.output, node.outputs, strict=False) if used]
        self._translate(function.node, wanted, inner, function.input)
        return [self._find(inner, name) if name in wanted else None for name in function.output]

    def _inline(
        self, node: OnnxNode, attribute: str, values: Sequence[Value], scope: Scope, prefix: str
    ) -> list[Value]:
        held = node.attributes.get(attribute)
        if held is None or held.type != onnx.AttributeProto.GRAPH:
            raise node.invalid(f"attribute {attribute!r} is not a graph")
        graph = held.g
        inner = Scope(scope.versions, attributes=scope.attributes, parent=scope, prefix=prefix, depth=scope.depth + 1)
        self._initializers(graph, inner)
        if len(values) != len(graph.input):
            raise node.invalid(f"the graph in {attribute!r} has {len(graph.input)} inputs, not {len(values)}")
        inner.values.update((info.name, value) for info, value in zip(graph.input, values, strict=True))
        outputs = [info.name for info in graph.output]
        self._translate(graph.node, outputs, inner, inner.values.keys() | inner.initializers.keys())
        return [self._tensor(inner, name, "subgraph output") for name in outputs]


def generated_symbol(name: str, axis: int) -> str:
    """The symbol for an axis of an input that the model does not name."""
    return f"{name}.{axis}"


def _attributes(proto: onnx.NodeProto, scope: Scope) -> dict[str, onnx.AttributeProto]:
    """The node's attributes; those that refer to an attribute of the function around are looked up there."""
    found: dict[str, onnx.AttributeProto] = {}
    for attribute in proto.attribute:
        if not attribute.ref_attr_name:
            found[attribute.name] = attribute
        elif attribute.ref_attr_name in scope.attributes:
            found[attribute.name] = scope.attributes[attribute.ref_attr_name]
    return found


def _check_inputs(node: OnnxNode, operator: Operator, inputs: Sequence[Value | None]) -> None:
    if len(inputs) > len(operator.required) and not operator.variadic:
        raise node.invalid(f"{len(inputs)} inputs; at most {len(operator.required)} are allowed")
    for i, required in enumerate(operator.required):
        if required and (i >= len(inputs) or inputs[i] is None):
            raise node.invalid(f"input {i} is missing")
    if operator.variadic and any(value is None for value in inputs[len(operator.required) :]):
        raise node.invalid("an input is missing")


def reads(proto: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads: its inputs, and what its subgraphs read from around them."""
    yield from (name for name in proto.input if name)
    for attribute in proto.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            own = {name for node in graph.node for name in node.output}
            own.update(info.name for info in graph.input)
            own.update(tensor.name for tensor in graph.initializer)
            inner = (name for node in graph.node for name in reads(node))
            outputs = (info.name for info in graph.output)
            yield from (name for name in (*inner, *outputs) if name and name not in own)


Indexed = tuple[int, onnx.NodeProto]


def in_order(nodes: Sequence[onnx.NodeProto], known: set[str], label: str) -> list[Indexed]:
    """The nodes, with their place in the file, so that each follows those that it reads from.

    Raises ModelError for a name computed twice and for a cycle. Names that nothing here computes are the lookup's.
    """
    producer: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in node.output:
            if name and (name in producer or name in known):
                raise ModelError(f"{label}: node {node.name or node.op_type!r}: {name!r} is computed twice")
            producer[name] = index
    before = [{producer[name] for name in reads(node) if name in producer} for node in nodes]
    if all(max(earlier, default=-1) < index for index, earlier in enumerate(before)):
        return list(enumerate(nodes))
    return [(index, nodes[index]) for index in _sorted(before, nodes, label)]


def _sorted(before: list[set[int]], nodes: Sequence[onnx.NodeProto], label: str) -> list[int]:
    waiting = [len(earlier) for earlier in before]
    after: list[list[int]] = [[] for _ in before]
    for index, earlier in enumerate(before):
        for other in earlier:
            after[other].append(index)
    ready = [index for index, count in enumerate(waiting) if count == 0]
    for index in ready:  # grows while it is walked
        for other in after[index]:
            waiting[other] -= 1
            if waiting[other] == 0:
                ready.append(other)
    if len(ready) < len(before):
        stuck = nodes[next(index for index, count in enumerate(waiting) if count)]
        raise ModelError(
            f"{label}: the graph has a cycle through node {stuck.name or stuck.op_type!r}; "
            "the file is damaged, export the model again"
        )
    return ready


def needed(nodes: list[Indexed], outputs: Iterable[str]) -> list[Indexed]:
    """Those of the (ordered) nodes that `outputs` depend on."""
    wanted = set(outputs)
    kept: list[Indexed] = []
    for index, node in reversed(nodes):
        if any(name in wanted for name in node.output if name):
            kept.append((index, node))
            wanted.update(reads(node))
    return kept[::-1]
