"""The order of the passes, and `run`.

The order in one sentence: multiply what is quantised as it is, make everything constant that is, carry types and views
in one form, recognise what was written in pieces while the pieces are still apart, bring point-wise chains together,
hang them onto the operators around them, move constants into weights, and choose types and orders in memory last.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TypeAlias

from engine.ir.graph import Graph
from engine.ir.printer import graph_text
from engine.passes.activations import canonicalise_activations
from engine.passes.affine import fold_affine
from engine.passes.attention import recognise_attention
from engine.passes.blocks import fuse_blocks
from engine.passes.causal import recognise_causal
from engine.passes.constant_parts import select_constant_parts
from engine.passes.divided_rows import divide_rows
from engine.passes.epilogues import fuse_batch_norms, fuse_epilogues
from engine.passes.excitation import fuse_excitations
from engine.passes.flatten import flatten_gemms, sink_views, spread_rows
from engine.passes.fold import fold
from engine.passes.layout import choose_orders, permute_flattened
from engine.passes.maxima import fuse_maxima
from engine.passes.means import fuse_means
from engine.passes.narrow import narrow_floats
from engine.passes.norms import recognise_norms, split_norm_groups
from engine.passes.pads import fold_pads
from engine.passes.pointwise import drop_expands, fuse_pointwise, hoist_slices, inline_literals
from engine.passes.precision import widen_floats
from engine.passes.prologues import fuse_gathers, fuse_prologues
from engine.passes.quantised import multiply_quantised
from engine.passes.rolls import find_rolls
from engine.passes.scaled_weights import scale_weights
from engine.passes.siblings import merge_siblings
from engine.passes.simplify import drop_unread, simplify
from engine.passes.traits import Traits
from engine.passes.views import merge_views

Pass: TypeAlias = Callable[[Graph, Traits], None]

PASSES: tuple[Pass, ...] = (
    multiply_quantised,
    fold,
    widen_floats,
    merge_views,
    drop_expands,
    inline_literals,
    simplify,
    find_rolls,
    hoist_slices,
    fold,
    recognise_norms,
    split_norm_groups,
    recognise_attention,
    hoist_slices,
    fold,
    recognise_causal,
    merge_views,
    flatten_gemms,
    fuse_batch_norms,
    fuse_pointwise,
    sink_views,
    merge_views,
    fuse_pointwise,
    canonicalise_activations,
    fold,
    fold_pads,
    fuse_epilogues,
    spread_rows,
    fold_affine,
    merge_siblings,
    select_constant_parts,
    fuse_gathers,
    fuse_prologues,
    fuse_epilogues,
    drop_unread,
    permute_flattened,
    merge_views,
    fold,
    narrow_floats,
    fold,
    choose_orders,
    fuse_maxima,
    fuse_blocks,
    fuse_means,
    fuse_excitations,
    scale_weights,
    divide_rows,
)

_PRINT_AFTER = "TILEWAVE_PRINT_AFTER"


def run(graph: Graph, traits: Traits) -> Graph:
    """Rewrite `graph` in place for a target with `traits`, and return it."""
    for rewrite in PASSES:
        rewrite(graph, traits)
        print_after(rewrite.__name__, graph)
    return graph


def print_after(name: str, graph: Graph) -> None:
    """Print the graph to stderr, if the environment asks for it after the pass called `name`."""
    if os.environ.get(_PRINT_AFTER, "") in (name, "all"):
        sys.stderr.write(f"# after {name}\n{graph_text(graph)}\n\n")
