"""The pass `fold_pads`: padding nodes become the padding of the convolution or pooling that reads them, also through
the transposition that an NHWC export has in between."""

from __future__ import annotations

from dataclasses import replace

from engine.ir import expr as ex
from engine.ir.expr import PointOp
from engine.ir.graph import Graph, Node, Value
from engine.ir.ops import Conv, Op, Pad, PadMode, Pool, PoolKind, Transpose
from engine.passes.editor import Editor, joined_origin
from engine.passes.operands import stores_of
from engine.passes.traits import Traits
from engine.passes.views import transpose

_LOWEST = -1e30  # a padding at or below this never wins a maximum


def fold_pads(graph: Graph, _traits: Traits) -> None:
    """Fold every padding of spatial axes with the value that the reader would pad with itself."""
    editor = Editor(graph)
    for node in editor.nodes():
        if isinstance(node.op, Conv | Pool) and editor.alive(node):
            _fold(editor, node)
    editor.finish()


def _fold(editor: Editor, node: Node) -> None:
    read = node.inputs[0]
    before, perm = editor.producer(read), tuple(range(read.rank))
    pad = before
    if before is not None and isinstance(before.op, Transpose):
        pad, perm = editor.producer(before.inputs[0]), before.op.perm
    if pad is None or not isinstance(pad.op, Pad):
        return
    moved = replace(pad.op, pads=tuple(pad.op.pads[axis] for axis in perm))
    new = _padded(editor, node.op, moved, pad.inputs[0])
    if new is not None:
        source = transpose(editor, pad.inputs[0], perm, pad.origin)
        editor.update(node, new, (source, *node.inputs[1:]), origin=joined_origin(pad, node))
        editor.prune([read])


def _padded(editor: Editor, op: Op, pad: Pad, source: Value) -> Op | None:
    if pad.mode is not PadMode.CONSTANT or any(pad.pads[0]) or any(pad.pads[1]) or any(min(p) < 0 for p in pad.pads):
        return None
    if isinstance(op, Conv):
        if op.transposed or pad.value != 0:
            return None
        return replace(op, pads=_sum(op.pads, pad.pads[2:]))
    assert isinstance(op, Pool)
    if op.ceil_mode:
        return None
    if op.kind is PoolKind.AVERAGE:
        # Zeros padded by hand count as elements; the pool's own do only with `count_include_pad`.
        if pad.value != 0 or (any(b or e for b, e in op.pads) and not op.count_include_pad):
            return None
        return replace(op, pads=_sum(op.pads, pad.pads[2:]), count_include_pad=True)
    absent = pad.value <= _LOWEST or (pad.value == 0 and _is_never_negative(editor.producer(source), source))
    pads = _sum(op.pads, pad.pads[2:])
    # A window in the padding alone has the padding's value, which the pool itself cannot give.
    fits = all(max(p) < k for p, k in zip(pads, op.kernel, strict=True))
    return replace(op, pads=pads) if absent and fits else None


def _sum(a: tuple[tuple[int, int], ...], b: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    return tuple((x[0] + y[0], x[1] + y[1]) for x, y in zip(a, b, strict=True))


def _is_never_negative(node: Node | None, value: Value) -> bool:
    """Whether `value` ends in a clamp from below at 0 or more."""
    stores = stores_of(node.op) if node is not None else ()
    if node is None or not stores:
        return False
    e = stores[node.outputs.index(value)]
    while isinstance(e, ex.Apply) and e.op is PointOp.MIN and isinstance(e.args[1], ex.Const) and e.args[1].value >= 0:
        e = e.args[0]
    return isinstance(e, ex.Apply) and e.op is PointOp.MAX and isinstance(e.args[1], ex.Const) and e.args[1].value >= 0
