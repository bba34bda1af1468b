"""Shapes: reading them, and laying the same elements out differently. Constants and ranges live here too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from engine.errors import ShapeError
from engine.frontend import bounds
from engine.frontend import formula as f
from engine.frontend.onnx_node import OnnxNode
from engine.frontend.registry import operator
from engine.frontend.tensors import dtype_of
from engine.ir import ops
from engine.ir.dim import Dim, Sym, ceildiv, floordiv, product
from engine.ir.dtype import DType
from engine.ir.graph import Value
from engine.ir.ops.base import broadcast_shapes

_MAX_DENSE = 2**22  # elements of a sparse constant that is stored densely


@operator("Shape")
def Shape(node: OnnxNode, x: Value) -> Value:
    begin, end, _ = slice(node.integer("start", 0), node.integer("end", x.rank)).indices(x.rank)
    return node.sizes(x.shape[begin:end])


@operator("Size")
def Size(node: OnnxNode, x: Value) -> Value:
    return node.builder.sizes([product(x.shape)], ())


@operator("Reshape")
def Reshape(node: OnnxNode, x: Value, shape: Value) -> Value:
    wanted = node.dims(shape, "a target shape")
    if not node.integer("allowzero", 0):
        if any(dim == 0 and i >= x.rank for i, dim in enumerate(wanted)):
            raise node.invalid(f"target shape {wanted} copies an axis that the input of rank {x.rank} lacks")
        wanted = [x.shape[i] if dim == 0 else dim for i, dim in enumerate(wanted)]
    return node.reshape(x, _complete(node, x, wanted))


def _complete(node: OnnxNode, x: Value, wanted: Sequence[Dim]) -> list[Dim]:
    """The target shape with its -1 replaced."""
    if sum(1 for dim in wanted if dim == -1) > 1 or any(isinstance(dim, int) and dim < -1 for dim in wanted):
        raise node.invalid(f"target shape {[str(dim) for dim in wanted]}")
    others = product(dim for dim in wanted if dim != -1)
    if -1 not in wanted:
        return list(wanted)
    total = product(x.shape)
    if others == 0:
        raise node.invalid(f"target shape {[str(dim) for dim in wanted]} leaves -1 open for a tensor without elements")
    rest = floordiv(total, others)
    if isinstance(rest, int) and rest * others != total and isinstance(total, int):
        raise node.invalid(f"{total} elements cannot have shape {[str(dim) for dim in wanted]}")
    return [rest if dim == -1 else dim for dim in wanted]


@operator("Flatten")
def Flatten(node: OnnxNode, x: Value) -> Value:
    axis = node.integer("axis", 1)
    if not -x.rank <= axis <= x.rank:
        raise node.invalid(f"axis {axis} of a tensor of rank {x.rank}")
    axis = axis + x.rank if axis < 0 else axis
    return node.reshape(x, (product(x.shape[:axis]), product(x.shape[axis:])))


@operator("Transpose")
def Transpose(node: OnnxNode, x: Value) -> Value:
    perm = node.integers("perm", range(x.rank)[::-1])
    if sorted(perm) != list(range(x.rank)):
        raise node.invalid(f"perm {list(perm)} for a tensor of rank {x.rank}")
    return node.transpose(x, perm)


def _axes(node: OnnxNode, axes: Value | None) -> list[int] | None:
    if axes is not None:
        return list(node.static_ints(axes, "axes"))
    return list(node.integers("axes")) if node.has("axes") else None


@operator("Squeeze")
def Squeeze(node: OnnxNode, x: Value, axes: Value | None = None) -> Value:
    given = _axes(node, axes)
    if given is None:
        if any(isinstance(dim, Sym) for dim in x.shape):
            raise node.unsupported(f"squeezing all axes of size 1 of [{', '.join(map(str, x.shape))}]")
        gone: tuple[int, ...] = tuple(i for i, dim in enumerate(x.shape) if dim == 1)
    else:
        gone = node.axes(given, x.rank)
    if any(isinstance(x.shape[i], int) and x.shape[i] != 1 for i in gone):
        raise node.invalid(f"axes {list(gone)} of shape {list(x.shape)} are not all of size 1")
    return node.reshape(x, [dim for i, dim in enumerate(x.shape) if i not in gone])


@operator("Unsqueeze")
def Unsqueeze(node: OnnxNode, x: Value, axes: Value | None = None) -> Value:
    given = _axes(node, axes)
    if given is None:
        raise node.invalid("axes are missing")
    new = node.axes(given, x.rank + len(given))
    old = iter(x.shape)
    return node.reshape(x, [1 if i in new else next(old) for i in range(x.rank + len(new))])


@operator("Expand")
def Expand(node: OnnxNode, x: Value, shape: Value) -> Value:
    wanted = node.dims(shape, "a target shape")
    return node.expand(x, broadcast_shapes("Expand", x.shape, tuple(wanted)))


@operator("Tile")
def Tile(node: OnnxNode, x: Value, repeats: Value) -> Value:
    counts = node.dims(repeats, "repeats")
    if len(counts) != x.rank:
        raise node.invalid(f"{len(counts)} repeats for a tensor of rank {x.rank}")
    result = x
    shape = list(x.shape)
    if all(dim == 1 for dim, count in zip(x.shape, counts, strict=True) if count != 1):
        return node.expand(x, [dim * count for dim, count in zip(shape, counts, strict=True)])
    for axis, count in enumerate(counts):
        if count != 1:
            size = shape[axis]
            apart = node.reshape(result, (*shape[:axis], 1, *shape[axis:]))
            repeated = node.expand(apart, (*shape[:axis], count, *shape[axis:]))
            shape[axis] = size * count
            result = node.reshape(repeated, shape)
    return result


@operator("DepthToSpace")
def DepthToSpace(node: OnnxNode, x: Value) -> Value:
    block = _block(node, x)
    n, c, h, w = x.shape
    out = floordiv(c, block * block)
    if out * block * block != c:
        raise node.invalid(f"{c} channels with blocksize {block}")
    if node.choice("mode", "DCR", "CRD") == "DCR":
        apart = node.transpose(node.reshape(x, (n, block, block, out, h, w)), (0, 3, 4, 1, 5, 2))
    else:
        apart = node.transpose(node.reshape(x, (n, out, block, block, h, w)), (0, 1, 4, 2, 5, 3))
    return node.reshape(apart, (n, out, h * block, w * block))


@operator("SpaceToDepth")
def SpaceToDepth(node: OnnxNode, x: Value) -> Value:
    block = _block(node, x)
    n, c, h, w = x.shape
    rows, columns = floordiv(h, block), floordiv(w, block)
    if rows * block != h or columns * block != w:
        raise node.unsupported(f"an image of {h} by {w} with blocksize {block}")
    perm = (0, 3, 5, 1, 2, 4) if node.choice("mode", "DCR", "CRD") == "DCR" else (0, 1, 3, 5, 2, 4)
    apart = node.transpose(node.reshape(x, (n, c, rows, block, columns, block)), perm)
    return node.reshape(apart, (n, c * block * block, rows, columns))


def _block(node: OnnxNode, x: Value) -> int:
    block = node.integer("blocksize")
    if block < 1 or x.rank != 4:
        raise node.invalid(f"blocksize {block} with an input of rank {x.rank}")
    return block


@operator("Constant")
def Constant(node: OnnxNode) -> Value:
    if node.has("value"):
        return node.constant(node.tensor("value"))
    if node.has("value_float"):
        return node.constant(node.number("value_float"), DType.F32)
    if node.has("value_floats"):
        return node.constant(node.numbers("value_floats"), DType.F32)
    if node.has("value_int"):
        return node.constant(node.integer("value_int"), DType.I64)
    if node.has("value_ints"):
        return node.constant(node.integers("value_ints"), DType.I64)
    if node.has("value_string"):
        return node.constant(np.array(node.text("value_string"), dtype=object))
    if node.has("value_strings"):
        texts = [text.decode("utf-8", "replace") for text in node.attributes["value_strings"].strings]
        return node.constant(np.array(texts, dtype=object))
    if node.has("sparse_value"):
        return node.constant(_dense(node, node.attributes["sparse_value"].sparse_tensor))
    raise node.invalid("no value")


def _dense(node: OnnxNode, sparse: onnx.SparseTensorProto) -> np.ndarray:
    shape = tuple(sparse.dims)
    if any(dim < 0 for dim in shape) or np.prod([float(dim) for dim in shape]) > _MAX_DENSE:
        raise node.unsupported(f"a sparse tensor of shape {list(shape)}")
    values = node.array(sparse.values, "sparse_value")
    indices = node.array(sparse.indices, "sparse_value")
    dense = np.zeros(shape, values.dtype)
    flat = indices if indices.ndim == 1 else np.ravel_multi_index(tuple(indices.T), shape)
    if flat.size and not (flat.min() >= 0 and flat.max() < dense.size):
        raise node.invalid("sparse_value has an index out of range")
    dense.reshape(-1)[flat] = values
    return dense


@operator("ConstantOfShape")
def ConstantOfShape(node: OnnxNode, shape: Value) -> Value:
    wanted = node.dims(shape, "a target shape")
    value = node.constant(node.tensor("value").reshape(-1)) if node.has("value") else node.constant([0.0], DType.F32)
    if value.shape != (1,):
        raise node.invalid(f"value has shape {list(value.shape)}, not [1]")
    return node.expand(node.reshape(value, (1,) * len(wanted)), wanted)


def positions(node: OnnxNode, count: Dim, axis: int = 0, rank: int = 1, dtype: DType = DType.I64) -> Value:
    """The numbers 0, 1, 2, … along `axis` of a tensor of `rank` axes."""
    line = node.add(ops.ShapeTensor((count,), None, dtype))
    return node.reshape(line, [count if i == axis else 1 for i in range(rank)])


@operator("Range")
def Range(node: OnnxNode, start: Value, limit: Value, delta: Value) -> Value:
    start, limit, delta = (node.reshape(value, ()) for value in (start, limit, delta))
    numbers = [node.known(value) for value in (start, limit, delta)]
    if all(number is not None for number in numbers):
        first, last, step = (number.item() for number in numbers if number is not None)
        if step == 0:
            raise node.invalid("delta is 0")
        count: Dim = max(0, int(np.ceil((last - first) / step)))
    elif start.dtype.is_float:
        raise node.unsupported("a range of floats that depends on data")
    else:
        (low,), (high,), (step,) = (node.dims(value, "a bound of Range") for value in (start, limit, delta))
        if not isinstance(step, int) or step == 0:
            raise node.unsupported(f"delta {step}")
        count = bounds.larger(0, ceildiv(high - low, step) if step > 0 else ceildiv(low - high, -step))
    line = positions(node, count, dtype=DType.I64)
    return node.pointwise(lambda i, s, d: i.cast(s.dtype) * d + s, line, start, delta)


@operator("EyeLike")
def EyeLike(node: OnnxNode, x: Value) -> Value:
    if x.rank != 2:
        raise ShapeError(f"EyeLike: a tensor of rank {x.rank}")
    dtype = dtype_of(node.integer("dtype"), node.where) if node.has("dtype") else x.dtype
    diagonal = node.integer("k", 0)
    rows, columns = positions(node, x.shape[0], 0, 2), positions(node, x.shape[1], 1, 2)
    return node.pointwise(lambda i, j: f.equal(i + diagonal, j).cast(dtype), rows, columns)


@operator("Trilu")
def Trilu(node: OnnxNode, x: Value, k: Value | None = None) -> Value:
    if x.rank < 2:
        raise node.invalid(f"a tensor of rank {x.rank}")
    diagonal = node.reshape(k, ()) if k is not None else node.constant(0, DType.I64)
    rows, columns = positions(node, x.shape[-2], 0, 2), positions(node, x.shape[-1], 1, 2)
    upper = node.integer("upper", 1)

    def formula(t: f.Term, i: f.Term, j: f.Term, d: f.Term) -> f.Term:
        kept = f.less_equal(i + d, j) if upper else f.less_equal(j, i + d)
        return f.where(kept, t, 0)

    return node.pointwise(formula, x, rows, columns, diagonal)
