"""Matrix products. Transposed operands are views, vectors get an axis, sums of products are brought to matrix form."""

from __future__ import annotations

from engine.frontend.formula import Term
from engine.frontend.onnx_node import OnnxNode, compute_dtype, store
from engine.frontend.operators.elementwise import same_dtype
from engine.frontend.registry import MICROSOFT, operator
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import Dim, product
from engine.ir.dtype import DType
from engine.ir.graph import Value
from engine.ir.ops.base import broadcast_shapes


def matmul(node: OnnxNode, a: Value, b: Value, scale: float = 1.0) -> Value:
    """`scale · a @ b` for operands of rank 2 and more."""
    same_dtype(node, a, b)
    if not a.dtype.is_float:  # integers: exact in fp64 up to 2⁵³
        return node.cast(matmul(node, node.cast(a, DType.F64), node.cast(b, DType.F64), scale), a.dtype)
    stores = store(a.dtype)
    if scale != 1.0:
        stores = ((Term(ex.Acc(compute_dtype(a.dtype))) * scale).cast(a.dtype).expr,)
    return node.add(ops.Gemm(stores), a, b)


def swap_last(node: OnnxNode, x: Value) -> Value:
    """The transposed matrices."""
    return node.transpose(x, (*range(x.rank - 2), x.rank - 1, x.rank - 2))


@operator("MatMul")
def MatMul(node: OnnxNode, a: Value, b: Value) -> Value:
    if not a.rank or not b.rank:
        raise node.invalid("an operand is a scalar")
    left = node.reshape(a, (1, *a.shape)) if a.rank == 1 else a
    right = node.reshape(b, (*b.shape, 1)) if b.rank == 1 else b
    result = matmul(node, left, right)
    shape = list(result.shape)
    if b.rank == 1:
        del shape[-1]
    if a.rank == 1:
        del shape[-1 if b.rank == 1 else -2]
    return node.reshape(result, shape)


@operator("FusedMatMul", domain=MICROSOFT)
def FusedMatMul(node: OnnxNode, a: Value, b: Value) -> Value:
    if node.integer("transBatchA", 0) or node.integer("transBatchB", 0):
        raise node.unsupported("a transposed batch axis")
    if a.rank < 2 or b.rank < 2:
        raise node.unsupported("a vector as an operand")
    left = swap_last(node, a) if node.integer("transA", 0) else a
    right = swap_last(node, b) if node.integer("transB", 0) else b
    return matmul(node, left, right, node.number("alpha", 1.0))


@operator("Gemm")
def Gemm(node: OnnxNode, a: Value, b: Value, c: Value | None = None) -> Value:
    if a.rank != 2 or b.rank != 2:
        raise node.invalid(f"operands of rank {a.rank} and {b.rank}; both must be matrices")
    same_dtype(node, a, b, *([c] if c is not None else []))
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)
    left = swap_last(node, a) if node.integer("transA", 0) else a
    right = swap_last(node, b) if node.integer("transB", 0) else b
    if c is None or beta == 0.0:
        return matmul(node, left, right, alpha)
    dtype = a.dtype
    if not dtype.is_float:
        left, right, c = (node.cast(value, DType.F64) for value in (left, right, c))
    wide = compute_dtype(left.dtype)
    result = Term(ex.Acc(wide)) if alpha == 1.0 else Term(ex.Acc(wide)) * alpha
    addend = Term(ex.Arg(2, c.dtype)).cast(wide)
    result = result + (addend if beta == 1.0 else addend * beta)
    broadcast_shapes(node.where, c.shape, (left.shape[0], right.shape[1]))
    return node.cast(node.add(ops.Gemm((result.cast(left.dtype).expr,)), left, right, c), dtype)


@operator("Einsum")
def Einsum(node: OnnxNode, *operands: Value) -> Value:
    """Operands are contracted from left to right, each step a batched matrix product."""
    equation = node.text("equation").replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = _expand_ellipsis(node, left.split(","), operands)
    ellipsis = "".join(c for c in dict.fromkeys("".join(terms)) if not c.isalpha())
    if not arrow:
        letters = "".join(terms)
        result = "..." + "".join(sorted(c for c in set(letters) if c.isalpha() and letters.count(c) == 1))
    result = result.replace("...", ellipsis)
    if not set(result) <= set("".join(terms)) or len(set(result)) != len(result):
        raise node.invalid(f"equation {equation!r}")
    sizes: dict[str, Dim] = {}
    for term, value in zip(terms, operands, strict=True):
        for letter, size in zip(term, value.shape, strict=True):
            sizes[letter] = size if sizes.get(letter, 1) == 1 else sizes[letter]
    current, labels = operands[0], terms[0]
    if len(operands) == 1:
        current, labels = _sum_out(node, current, labels, result)
    for i in range(1, len(operands)):
        keep = set(result) | set("".join(terms[i + 1 :]))
        pair = [(current, labels), (operands[i], terms[i])]
        if i == len(operands) - 1 and _comes_first(terms[i], labels, result):
            pair.reverse()
        current, labels = _contract(node, *pair[0], *pair[1], keep, sizes)
    current, labels = _sum_out(node, current, labels, result)
    current = node.transpose(current, [labels.index(c) for c in result])
    return node.expand(current, [sizes[c] for c in result])


def _comes_first(b_labels: str, a_labels: str, result: str) -> bool:
    """Whether the rows of the result come from the second operand, as Keras writes q kᵀ: the product is then made that
    way round, instead of transposed afterwards."""
    own = [c for c in result if (c in a_labels) != (c in b_labels)]
    return bool(own) and own[0] in b_labels


def _expand_ellipsis(node: OnnxNode, terms: list[str], operands: tuple[Value, ...]) -> list[str]:
    """Terms with a digit per axis of `...`, aligned at the end, and every axis of every operand named."""
    if len(terms) != len(operands) or not operands:
        raise node.invalid(f"an equation of {len(terms)} terms for {len(operands)} operands")
    expanded = []
    for term, value in zip(terms, operands, strict=True):
        hidden = value.rank - len(term.replace("...", ""))
        if hidden < 0 or hidden > 9 or (hidden and "..." not in term):
            raise node.invalid(f"term {term!r} for an operand of rank {value.rank}")
        full = term.replace("...", "".join(str(i) for i in range(9, 9 - hidden, -1))[::-1])
        if len(set(full)) != len(full):
            raise node.unsupported(f"the diagonal in term {term!r}")
        expanded.append(full)
    return expanded


def _sum_out(node: OnnxNode, x: Value, labels: str, keep: str | set[str]) -> tuple[Value, str]:
    """Sum over the axes whose letters nothing needs any more."""
    gone = tuple(i for i, c in enumerate(labels) if c not in keep)
    if not gone:
        return x, labels
    wide = compute_dtype(x.dtype)
    op = ops.Reduce(ops.ReduceKind.SUM, gone, False, ex.cast(ex.Arg(0, x.dtype), wide), store(x.dtype))
    return node.add(op, x), "".join(c for c in labels if c in keep)


def _contract(
    node: OnnxNode, a: Value, a_labels: str, b: Value, b_labels: str, keep: set[str], sizes: dict[str, Dim]
) -> tuple[Value, str]:
    """One batched product: letters in both and kept are batch axes, those in both and not kept are summed."""
    a, a_labels = _sum_out(node, a, a_labels, keep | set(b_labels))
    b, b_labels = _sum_out(node, b, b_labels, keep | set(a_labels))
    both = [c for c in a_labels if c in b_labels]
    batch, inner = [c for c in both if c in keep], [c for c in both if c not in keep]
    rows, columns = [c for c in a_labels if c not in both], [c for c in b_labels if c not in both]
    a = node.expand(a, [a.shape[i] if c in batch else sizes[c] for i, c in enumerate(a_labels)])
    b = node.expand(b, [b.shape[i] if c in batch else sizes[c] for i, c in enumerate(b_labels)])
    left = node.transpose(a, [a_labels.index(c) for c in (*batch, *rows, *inner)])
    right = node.transpose(b, [b_labels.index(c) for c in (*batch, *inner, *columns)])
    count = len(batch)
    m, k, n = (product(sizes[c] for c in group) for group in (rows, inner, columns))
    left = node.reshape(left, (*left.shape[:count], m, k))
    right = node.reshape(right, (*right.shape[:count], k, n))
    result = matmul(node, left, right)
    shape = (*result.shape[:count], *(sizes[c] for c in (*rows, *columns)))
    return node.reshape(result, shape), "".join((*batch, *rows, *columns))
