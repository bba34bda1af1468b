"""Operators without a function of their own: ONNX's definition in terms of others, or an `Opaque` node.

`translate` comes here for an operator that is not in the registry. Never for convolutions, matrix products, attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from engine.frontend.content import MAX_NUMBERS
from engine.frontend.onnx_node import OnnxNode
from engine.frontend.tensors import DTYPES, PROTO_TYPES
from engine.ir import ops
from engine.ir.dim import Dim, Sym, product
from engine.ir.dtype import DType
from engine.ir.graph import Value

# Products, random numbers (a request must be reproducible), and what has no tensor for a result.
_NEVER = frozenset(
    {
        "Attention", "Conv", "ConvInteger", "ConvTranspose", "DeformConv", "Einsum", "Gemm", "MatMul",
        "MatMulInteger", "QLinearConv", "QLinearMatMul", "LinearAttention", "CausalConvWithState",
        "If", "Loop", "Scan", "SequenceMap", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
        "Bernoulli", "Multinomial", "ImageDecoder",
    }
)  # fmt: skip
_DOMAINS = frozenset({"", "ai.onnx.ml"})  # those of onnx.reference; training operators are not for inference
_DATA_DEPENDENT = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression"})
_MAX_CONTENT = 4096  # elements of a constant given to shape inference


def is_known(node: OnnxNode) -> bool:
    """Whether the installed onnx package defines the operator."""
    return _schema(node) is not None


def _schema(node: OnnxNode) -> Any:  # the stubs of OpSchema lack its functions
    try:
        return onnx.defs.get_schema(node.op_type, node.version, node.domain)
    except onnx.defs.SchemaError:
        return None


def function_body(node: OnnxNode, inputs: Sequence[Value | None]) -> onnx.FunctionProto | None:
    """ONNX's definition of the operator in terms of others, None where it has none."""
    schema = _schema(node)
    if schema is None:
        return None
    if schema.has_function:
        body: onnx.FunctionProto = schema.function_body
        return body
    if schema.has_context_dependent_function:
        proto = _renamed(node, inputs)
        types = [_type_proto(value).SerializeToString() for value in inputs if value is not None]
        serialised: bytes = schema.get_context_dependent_function(proto.SerializeToString(), types)
        return onnx.FunctionProto.FromString(serialised) if serialised else None
    return None


def default_attributes(node: OnnxNode) -> dict[str, onnx.AttributeProto]:
    """The attributes that ONNX's definition takes for granted where the node does not give them."""
    schema = _schema(node)
    attributes = schema.attributes.values() if schema is not None else ()
    return {attribute.name: attribute.default_value for attribute in attributes if attribute.default_value.name}


def opaque(node: OnnxNode, inputs: Sequence[Value | None]) -> list[Value | None]:
    """An `Opaque` node, with result types from ONNX's shape inference."""
    if node.op_type in _NEVER or node.domain not in _DOMAINS:
        raise node.unsupported(f"operator {node.op_type!r}")
    if node.op_type in _DATA_DEPENDENT:
        raise node.unsupported(f"operator {node.op_type!r}, whose result's shape depends on the data,")
    present = [value for value in inputs if value is not None]
    node.attributes = default_attributes(node) | node.attributes
    proto = _renamed(node, inputs)
    versions = dict(node.versions)
    results = _result_types(node, proto, versions, inputs)
    opsets = tuple(sorted(versions.items()))
    folded = _folded(node, proto, versions, present, results)
    if folded is not None:
        values = iter(folded)
        return [next(values) if name else None for name in node.outputs]
    op = ops.Opaque(node.op_type, proto.SerializeToString(), opsets, results)
    values = iter(node.add_all(op, *present))
    return [next(values) if name else None for name in node.outputs]


def _folded(
    node: OnnxNode,
    proto: onnx.NodeProto,
    opsets: dict[str, int],
    inputs: Sequence[Value],
    results: Sequence[tuple[DType, tuple[Dim, ...]]],
) -> list[Value] | None:
    """The results as constants where all inputs are small constants (exporters write masks that way)."""
    arrays = [node.known(value) for value in inputs]
    sizes = [product(shape) for _, shape in results]
    if any(isinstance(size, Sym) or size > MAX_NUMBERS for size in sizes):
        return None
    if any(array is None or array.size > MAX_NUMBERS or array.dtype == object for array in arrays):
        return None
    names = [name for name in proto.input if name]
    infos = [onnx.ValueInfoProto(name=name, type=_type_proto(v)) for name, v in zip(names, inputs, strict=True)]
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
    graph = helper.make_graph([proto], "fold", infos, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*pair) for pair in opsets.items()])
    computed: Any = ReferenceEvaluator(model).run(None, dict(zip(names, arrays, strict=True)))
    return [node.constant(np.asarray(array), dtype) for array, (dtype, shape) in zip(computed, results, strict=True)]


def opaque_value(node: OnnxNode, *inputs: Value) -> Value:
    """The only result of an `Opaque` node."""
    (value,) = opaque(node, inputs)
    assert value is not None
    return value


def _renamed(node: OnnxNode, inputs: Sequence[Value | None]) -> onnx.NodeProto:
    """The node with inputs i0, i1, … and outputs o0, o1, …, numbered over those present."""
    proto = onnx.NodeProto()
    proto.CopyFrom(node.proto)
    del proto.input[:], proto.output[:], proto.attribute[:]
    proto.attribute.extend(node.attributes.values())
    for attribute, name in zip(proto.attribute, node.attributes, strict=True):
        attribute.name = name
    count = 0
    for value in inputs:
        proto.input.append(f"i{count}" if value is not None else "")
        count += value is not None
    proto.output.extend(f"o{i}" if name else "" for i, name in enumerate(node.outputs))
    return proto


def _type_proto(value: Value) -> onnx.TypeProto:
    return helper.make_tensor_type_proto(
        PROTO_TYPES[value.dtype], [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
    )


def _result_types(
    node: OnnxNode, proto: onnx.NodeProto, opsets: dict[str, int], inputs: Sequence[Value | None]
) -> tuple[tuple[DType, tuple[Dim, ...]], ...]:
    infos, initializers = [], []
    named: dict[str, Dim] = {}
    for name, value in zip(proto.input, inputs, strict=True):
        if value is None:
            continue
        named.update({str(dim): dim for dim in value.shape if not isinstance(dim, int)})
        known = node.known(value)
        if known is not None and known.size <= _MAX_CONTENT:
            initializers.append(onnx.numpy_helper.from_array(known, name))
        else:
            infos.append(onnx.ValueInfoProto(name=name, type=_type_proto(value)))
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
    graph = helper.make_graph([proto], "shapes", infos, outputs, initializers)
    versions = {"": onnx.defs.onnx_opset_version()} | opsets
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(*pair) for pair in versions.items()])
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except Exception as error:
        raise node.invalid(f"ONNX's shape inference refuses it: {error}") from error
    return tuple(_result_type(node, info, named) for info in inferred.graph.output)


def _result_type(node: OnnxNode, info: onnx.ValueInfoProto, named: dict[str, Dim]) -> tuple[DType, tuple[Dim, ...]]:
    tensor = info.type.tensor_type
    if not tensor.HasField("shape") or tensor.elem_type == TensorProto.UNDEFINED:
        raise node.unsupported("a result whose shape depends on the data")
    shape: list[Dim] = []
    for dim in tensor.shape.dim:
        if dim.HasField("dim_value"):
            shape.append(dim.dim_value)
        elif dim.dim_param in named:
            shape.append(named[dim.dim_param])
        else:
            raise node.unsupported("a result whose shape depends on the data")
    if tensor.elem_type not in DTYPES:
        raise node.unsupported("a result of this element type")
    return DTYPES[tensor.elem_type], tuple(shape)
