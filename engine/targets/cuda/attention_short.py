"""Attention of packed sequences of about a tile or two on sm_90a (attention_short.cuh): small blocks, two to five to a
multiprocessor, that hide each other's latency."""

from __future__ import annotations

from dataclasses import dataclass

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.targets.cuda.attention_operands import Attended, strides
from engine.targets.cuda.attention_wgmma import depth, map_of, readable, register_product, width
from engine.targets.cuda.attention_wgmma_tiles import LAUNCH, MEMORY_BYTES, Work, as_long
from engine.targets.cuda.gemm_wgmma import wgmma_function
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    I64s,
    Instruction,
    Launch,
    ceildiv,
    launch,
    pointer_to,
)
from engine.targets.cuda.spaces import VECTOR

MAX_SEQUENCES = 256  # whose order fits beside the tiles of all blocks
WIDEST = 128  # features of a head
_THREADS = 128
_ROWS = 64  # of a tile of queries or keys
_BOX = 32  # rows that are copied at once
_PIECES = 64  # that are looked up, 32 bytes each

# Cycles of a multiprocessor: for a piece, by its features of q and v together, for each of its tiles of keys, and until
# the first copy. Of what is beyond `NARROW` features, a tile takes more and a piece less. `ALONE`: from the first copy
# to the last store.
_FEATURE, _PIECE, _TILE = 11.7, -700, 650
_NARROW, _WIDE_FEATURE, _WIDE_TILE = 128, 4.2, 5.5
_ALONE, _TILE_ALONE = 130, 370
_ORDER = 2420


@dataclass(frozen=True)
class ShortTile:
    """A block: `stages` tiles of 64 keys, values and queries. `blocks` blocks share a multiprocessor."""

    stages: int
    blocks: int

    def shared_bytes(self, head: int, value: int, places: int) -> int:
        """Tiles, pieces, places and barriers (attention_short.cuh), of padded heads."""
        tiles = self.stages * _ROWS * (2 * ceildiv(head, 32) * 32 + value) * 2
        return tiles + 32 * _PIECES + 12 * places + 8 * self.stages


def suits(step: Step) -> bool:
    """Whether the copy engine can read q, k and v, and the kernel has what the operator asks."""
    attended, output = Attended(step), step.outputs[0]
    (store, *more), dtype = attended.op.stores, step.inputs[0].dtype
    return (
        attended.op.packed
        and dtype in (DType.F16, DType.BF16)
        and attended.op.scale > 0  # it meets the scores behind the maximum
        and 2 <= attended.sequences <= MAX_SEQUENCES
        and max(step.inputs[0].shape[-1], step.inputs[2].shape[-1]) <= WIDEST
        and all(readable(tensor) for tensor in step.inputs[:3])
        and not more
        and store == ex.cast(ex.Acc(), dtype)
        and readable(output)
        and strides(output)[-1] == 1
        and output.shape[-1] % VECTOR == 0
    )


def places_of(sequences: int) -> int:
    """Room for the order of so many sequences: as many for each thread."""
    return ceildiv(sequences, _THREADS) * _THREADS


def candidates(step: Step) -> list[ShortTile]:
    """Tiles for a step that `suits`, the one that was fastest on an H100 first. Where heads are narrow the registers of
    five blocks are enough; three blocks of wide heads with a stage each were 2 to 16 % slower than two with two."""
    widest = max(depth(step.inputs[0]), width(step.inputs[2]))
    if widest <= 32:
        return [ShortTile(3, 4), ShortTile(2, 5)]
    return [ShortTile(2, 4 if widest <= 64 else 2)]


def pick(step: Step) -> ShortTile:
    """The tile for a step that `suits`."""
    return candidates(step)[0]


def cycles(work: Work, multiprocessors: int) -> float:
    """Estimated cycles of packed attention, at about 1.7 GHz. The constants are fitted, together with those of
    packed attention in attention_wgmma_tiles.py, to 38 cases on an H100 (fp16, heads of 32, 64 and 128, 30 to 2000
    tokens on average)."""
    work_cycles, longest = 0.0, 0.0
    features = work.head + work.value
    wide = max(0, features - _NARROW)
    piece = max(0, _PIECE + _FEATURE * (features - wide) + _WIDE_FEATURE * wide)
    tile = _TILE + _WIDE_TILE * wide
    for kind in as_long(work):
        of_queries = ceildiv(kind.queries, _ROWS)
        of_keys = [
            ceildiv(min(kind.keys, (i + 1) * _ROWS), _ROWS) if work.causal else of_queries for i in range(of_queries)
        ]
        work_cycles += kind.groups * sum(piece + tile * count for count in of_keys)
        longest = max(longest, _ALONE + _TILE_ALONE * max(of_keys))
    moved = work.groups * (work.queries + work.keys) * (work.head + work.value) * 2
    floor = moved / (multiprocessors * MEMORY_BYTES)
    return LAUNCH + _ORDER + max(floor, work_cycles / multiprocessors) + longest / 2


def _shared_bytes(step: Step, tile: ShortTile) -> int:
    return tile.shared_bytes(depth(step.inputs[0]), width(step.inputs[2]), places_of(Attended(step).sequences))


def launch_attention(step: Step, tile: ShortTile, context: Context) -> Launch:
    """The launch of an attention that `suits`, in the given tile."""
    attended, (q, k, v), output = Attended(step), step.inputs[:3], step.outputs[0]
    _, heads, queries, _ = attended.sizes
    head, value, shared = depth(q), width(v), _shared_bytes(step, tile)
    # At most: a tile of each sequence is short, and of what belongs to none.
    pieces = (ceildiv(queries, _ROWS) + attended.sequences) * heads
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[q.dtype], "head_padded": head, "value_padded": value, "stages": tile.stages,
        "box": _BOX, "early": attended.starts_are_fed,
        "causal": attended.op.causal, "places": places_of(attended.sequences),
        "blocks": tile.blocks, "shared_bytes": shared,
    }  # fmt: skip
    arguments: dict[str, Argument] = {
        "map_q": map_of(q, _BOX, head), "map_k": map_of(k, _BOX, head), "map_v": map_of(v, _BOX, value),
        **attended.arguments(), "out": pointer_to(output), "out_stride": I64s(strides(output)[1:3]),
    }  # fmt: skip
    products = wgmma_function(_ROWS, q.dtype) + register_product(value, q.dtype)
    return launch(
        "attention", "attention_short.cuh", config, [], arguments,
        (min(pieces, context.multiprocessors * tile.blocks), 1, 1), _THREADS, shared, Instruction.WGMMA,
        helpers="".join(('#include "ptx/wgmma_panels.cuh"\n', products, attended.sequences_code())),
    )  # fmt: skip
