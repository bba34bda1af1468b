"""What an attention's bias hides, proved from the mask it is computed from. Called by the pass `unpad`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.ir.graph import Node, Value
from engine.ir.ops import Attention
from engine.passes.unpad.elements import Elements, Index, Place, Relation

HIDDEN = -1e4
"""A bias at or below this hides a key for good: its probability is exactly 0 unless scores of one query differ by more
than 9,800 (exp underflows at −104)."""


class Refused(Exception):
    """The proof fails; the message says in a few words why."""


def hides_only(node: Node, mask: Value, producers: Mapping[Value, Node]) -> bool:
    """Whether the attention `node` is causal, where its bias does nothing else than to hide padded and, if causal,
    later keys: real ones get 0. Raises Refused where that cannot be shown for every real query."""
    op = node.op
    assert isinstance(op, Attention)
    where = f"attention {node.origin!r}"
    if op.packed:
        raise Refused(f"{where} is packed already")
    if op.scale <= 0:
        raise Refused(f"{where} has a scale of {op.scale:g}")
    if op.window is not None:
        raise Refused(f"{where} sees a window")
    if not op.has_bias:
        raise Refused(f"{where} has no mask")
    bias = node.inputs[3]
    indices = (Index.SEQUENCE, Index.ANY, Index.QUERY, Index.KEY)
    if node.inputs[0].rank != len(indices):
        raise Refused(f"{where} has operands of rank {node.inputs[0].rank}")

    def hidden(real: bool, relation: Relation) -> bool:
        found = Elements(producers, mask, Place(real, relation)).beside(bias, indices)
        if not isinstance(found, np.generic) or np.isnan(float(found)):
            raise Refused(f"{where}: its bias is more than a mask of {mask.name!r}")
        if found == 0:
            return False
        if float(found) > HIDDEN:
            raise Refused(f"{where}: a bias of {float(found):g} hides nothing for good")
        return True

    if not all(hidden(False, relation) for relation in Relation):
        raise Refused(f"{where} shows padded keys")
    before, at, after = (hidden(True, relation) for relation in (Relation.BEFORE, Relation.AT, Relation.AFTER))
    if before or at:
        raise Refused(f"{where} hides real keys")
    return after or op.causal
