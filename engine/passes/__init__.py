"""Graph rewrites: `run` turns the graph that the frontend wrote into a short graph of fused operators for one target.

One file per rewrite. Each pass is a function `(graph, traits) -> None` that changes the graph in place and can be run
and tested alone; `PASSES` is the order. `TILEWAVE_PRINT_AFTER=<pass>` (or `all`) prints the graph after a pass to
stderr. `unpad` is no member of it: from a finished graph it makes another one, on packed tokens.
"""

from engine.passes.pipeline import PASSES, run
from engine.passes.traits import Traits

__all__ = ["PASSES", "Traits", "run"]
