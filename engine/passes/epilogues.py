"""The passes that make point-wise nodes the stores of the operator whose result they read.

`fuse_batch_norms`: what only scales and shifts the result of a convolution joins it first, so that where a residual sum
reads two convolutions each keeps its own normalisation, to be folded into its weights. `fuse_epilogues`: all the rest.

A node with a choice (a residual add reads two results) goes to a heavy operator before a light one, to one that nobody
else reads before one that has to store its own result too, to one that can merge with no sibling before one that could
(`siblings.py`), and to the later one, when all the rest is there already.
"""

from __future__ import annotations

from engine.ir import expr as ex
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import Conv, Pointwise
from engine.passes.editor import Editor, joined_origin
from engine.passes.operands import FUSED_OPS, HEAVY_OPS, Operands, fixed_operands, stores_of, with_expressions
from engine.passes.siblings import has_sibling
from engine.passes.simplify import simplified
from engine.passes.traits import Traits

_MOST_STORES = 2
_MOST_INPUTS = 12
_AFFINE = {ex.PointOp.ADD, ex.PointOp.SUB, ex.PointOp.MUL, ex.PointOp.DIV, ex.PointOp.NEG}


def fuse_batch_norms(graph: Graph, _traits: Traits) -> None:
    """Fuse every point-wise node that is affine, with constants, in the result of one convolution."""
    editor = Editor(graph)
    for node in editor.nodes():
        op = node.op
        if not isinstance(op, Pointwise) or op.gathers or len(op.stores) != 1:
            continue
        computed = [value for value in node.inputs if not value.is_constant]
        host = editor.producer(computed[0]) if len(computed) == 1 else None
        if host is None or not isinstance(host.op, Conv) or not editor.single_use(computed[0]):
            continue
        operations = [e for e in ex.walk(*op.stores) if isinstance(e, ex.Apply)]
        if computed[0].shape == node.output.shape and all(e.op in _AFFINE for e in operations):
            _fuse(editor, host, computed[0], node)
    editor.finish()


def fuse_epilogues(graph: Graph, _traits: Traits) -> None:
    """Fuse every point-wise node that can ride in an epilogue, in topological order."""
    editor = Editor(graph)
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in editor.nodes():
        if isinstance(node.op, Pointwise) and not node.op.gathers:
            for host, value in _hosts(editor, node, position):
                if _fuse(editor, host, value, node):
                    position[host] = position[node]
                    break
    editor.finish()


def _hosts(editor: Editor, node: Node, position: dict[Node, int]) -> list[tuple[Node, Value]]:
    """(operator, its result that `node` reads), the best first."""
    shape = node.outputs[0].shape
    found = []
    for value in dict.fromkeys(node.inputs):
        host = editor.producer(value)
        if host is not None and isinstance(host.op, FUSED_OPS) and value.shape == shape:
            found.append((host, value))
    found.sort(
        key=lambda pair: (
            isinstance(pair[0].op, HEAVY_OPS),
            editor.single_use(pair[1]),
            not has_sibling(editor, pair[0]),
            position.get(pair[0], 0),
        ),
        reverse=True,
    )
    return found


def _fuse(editor: Editor, host: Node, value: Value, node: Node) -> bool:
    op = host.op
    keeps = editor.only_user(value) is not node
    results = [v for v in host.outputs if keeps or v is not value]
    others = [v for v in node.inputs if v not in host.outputs]
    if len(results) + len(node.outputs) > _MOST_STORES and (keeps or len(node.outputs) > 1):
        return False
    if len(results) and editor.depends(others, host):
        return False
    operands = Operands(host.inputs[: fixed_operands(op)])
    source = getattr(op, "source", None)
    source = None if source is None else operands.adopt(source, host)
    stored = {v: operands.adopt(store, host) for v, store in zip(host.outputs, stores_of(op), strict=True)}
    tails = tuple(simplified(operands.adopt(store, node, stored)) for store in stores_of(node.op))
    # A tail that no longer reads the result (it was multiplied away) would leave its other arguments without a shape.
    if len(operands.inputs) > _MOST_INPUTS or not all(ex.uses_acc(tail) for tail in tails):
        return False
    stores = (*(stored[v] for v in results), *tails)
    editor.remove(node)
    editor.update(
        host,
        with_expressions(op, stores, source, operands.gathers),
        operands.inputs,
        (*results, *node.outputs),
        joined_origin(host, node),
    )
    return True
