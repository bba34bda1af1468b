"""Attention on sm_90a (attention_wgmma.cuh): operands through the copy engine, products on whole warpgroups."""

from __future__ import annotations

from math import gcd

import numpy as np

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.plan.tensor import Buffer, BufferKind, Tensor
from engine.targets.cuda.attention_operands import Attended, BiasKind, four, strides
from engine.targets.cuda.attention_wgmma_tiles import BAND, WgmmaAttentionTile, Work, candidates, cycles, streams
from engine.targets.cuda.gemm_wgmma import wgmma_function
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    Instruction,
    Launch,
    Pointer,
    TensorMap,
    ceildiv,
    launch,
    pointer_to,
)
from engine.targets.cuda.spaces import VECTOR

MAX_WIDTH = 256  # features of a head
_BOX = 32  # rows that are copied at once where sequences end within tiles
_DEALT = 4  # items a block
_MASK_TILES = 32  # tiles of keys, up to which those that a padding mask hides are left out: a bit each
MAX_SEQUENCES = 1023  # packed ones whose order fits beside the tiles
_MIN_QUERIES = 17  # up to 16 the portable kernel wastes fewer rows, and deals the keys to several blocks


def suits(step: Step) -> bool:
    """Whether the copy engine can read q, k, v and a full bias, and the kernel has what the operator asks."""
    attended = Attended(step)
    return (
        step.inputs[0].dtype in (DType.F16, DType.BF16)
        and attended.op.scale > 0  # it meets the scores behind the maximum
        and (attended.op.packed or attended.sizes[2] >= _MIN_QUERIES)
        and attended.sequences <= MAX_SEQUENCES
        and all(readable(tensor) for tensor in step.inputs[:3])
        and (attended.bias is not BiasKind.FULL or _readable_bias(attended))
    )


def _readable_bias(attended: Attended) -> bool:
    """Keys are neighbours, and start and strides whole chunks of 16 bytes."""
    bias, chunk = attended.step.inputs[3], 16 // attended.step.inputs[3].dtype.itemsize
    *outer, inner = attended.bias_strides
    return inner == 1 and bias.offset % chunk == 0 and all(stride >= 0 and stride % chunk == 0 for stride in outer)


def readable(tensor: Tensor) -> bool:
    """Starts and strides are whole, positive chunks of 16 bytes, as the copy engine needs them; no axis is empty."""
    *outer, _ = zip(tensor.shape, tensor.strides, strict=True)
    return (
        0 < tensor.shape[-1] <= MAX_WIDTH
        and tensor.offset % VECTOR == 0
        and all(size == 1 or (size > 0 and stride > 0 and stride % VECTOR == 0) for size, stride in outer)
    )


def _places(sequences: int) -> int:
    """Room for the order of so many packed sequences and what lies behind them; few sizes, that kernels are few."""
    return max(32, 1 << sequences.bit_length())


def _padded(features: int, multiple: int) -> int:
    return ceildiv(features, multiple) * multiple


def depth(tensor: Tensor) -> int:
    """Features of q or k that the instruction sums over, 16 at a time; beyond 128 whole panels. The copy engine
    supplies zeros beyond a head's own."""
    features = tensor.shape[-1]
    return _padded(features, 16 if features <= 128 else 32)


def width(tensor: Tensor) -> int:
    """Features of v that a block computes: four blocks of eight at a time go to the epilogue."""
    return _padded(tensor.shape[-1], 32)


def pick(step: Step, context: Context) -> WgmmaAttentionTile:
    """The tile with the least estimated time; of equal ones, as where memory binds, the one with fewest queries beyond
    the end. A mask by key hides tiles that the host does not know of: then of equal ones the smallest, with which
    blocks even that out. Of those that are still equal the one with most keys under way, where that is what counts."""
    work = work_of(step)

    def rank(tile: WgmmaAttentionTile) -> tuple[float, int, int, int]:
        estimated = cycles(tile, work, context.multiprocessors)
        padded = ceildiv(work.queries, tile.queries) * tile.queries
        under_way = tile.stages * tile.keys if streams(tile, work, context.multiprocessors) else 0
        return estimated, padded, tile.queries if work.bias is BiasKind.PER_KEY else 0, -under_way

    return min(candidates(work), key=rank)


def work_of(step: Step) -> Work:
    """What there is to do in an attention step."""
    attended = Attended(step)
    batch, heads, queries, _ = attended.sizes
    keys, groups, places = attended.keys, batch * heads, 0
    if attended.op.packed:
        # How long sequences are only the device knows: here is their mean.
        queries = keys = max(1, ceildiv(queries, max(1, attended.sequences)))
        groups = max(1, attended.sequences) * heads
        places = 0 if attended.sequences == 1 else _places(attended.sequences)
    full = attended.bias is BiasKind.FULL
    return Work(
        queries, keys, groups, depth(step.inputs[0]), width(step.inputs[2]), attended.op.causal, attended.bias,
        step.inputs[3].dtype.itemsize if full else 0, step.inputs[3].elements if full else 0, places,
        attended.op.window, attended.op.packed,
    )  # fmt: skip


def launch_attention(step: Step, tile: WgmmaAttentionTile, context: Context) -> Launch:
    """The launch of an attention that `suits`, in the given tile."""
    attended, (q, k, v) = Attended(step), step.inputs[:3]
    op, (batch, heads, queries, _) = attended.op, attended.sizes
    work = work_of(step)
    head, value, shared = work.head, work.value, tile.shared_bytes(work)
    # Of packed sequences at most: a tile of each is short, and of what belongs to none. One has those of all tokens.
    single = attended.sequences == 1
    items = (ceildiv(queries, tile.queries) + (0 if single else attended.sequences)) * heads * batch
    blocks = min(items, context.multiprocessors * tile.blocks)
    key_tiles = ceildiv(k.shape[-2], tile.keys)
    # Of a sequence that ends within a tile only whole boxes up to its end are copied.
    box = gcd(_BOX, tile.keys) if op.packed and not single else 0
    ordered = op.causal or op.window is not None  # not every query sees every key
    skips = attended.bias is BiasKind.PER_KEY and not ordered and 1 < key_tiles <= _MASK_TILES
    equal = not (ordered or op.packed or skips)  # items are: dealt beforehand a few a block take 1 to 6 % less
    dynamic = items > (_DEALT if equal else 1) * blocks
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[q.dtype], "head_padded": head, "value_padded": value, "keys": tile.keys,
        "consumers": tile.consumers, "stages": tile.stages, "causal": op.causal, "bias": attended.bias,
        "bias_type": STORAGE[step.inputs[3].dtype] if op.has_bias else "float",
        "masked_rows_zero": op.masked_rows_zero, "producer_registers": tile.producer_registers,
        "consumer_registers": tile.consumer_registers, "blocks": tile.blocks, "shared_bytes": shared,
        "q_stages": tile.q_stages, "turns": tile.turns, "band": BAND, "dynamic": dynamic, "packed": op.packed,
        "single": single, "places": work.places, "early": attended.starts_are_fed, "box": box,
        "window": op.window is not None,
        "skips": skips,
    }  # fmt: skip
    arguments: dict[str, Argument] = {
        "map_q": map_of(q, tile.queries, head), "map_k": map_of(k, tile.keys, head),
        "map_v": map_of(v, tile.keys, value),
        **attended.arguments(), "groups": batch * heads,
        # 0 where all of the batch read the same.
        "q_batches": int(q.shape[0] > 1), "k_batches": int(k.shape[0] > 1), "v_batches": int(v.shape[0] > 1),
    }  # fmt: skip
    if box:
        maps = {"q": map_of(q, box, head), "k": map_of(k, box, head), "v": map_of(v, box, value)}
        arguments |= {f"ends_{name}": ends for name, ends in maps.items()}
    arguments |= {"bias_heads": 0, "bias_batches": 0}
    full = attended.bias is BiasKind.FULL
    if full:
        arguments |= _bias_arguments(attended, tile)
    if dynamic:
        arguments["counters"] = Pointer(Buffer("taken items", BufferKind.PLAN, 8, np.zeros(2, np.uint32)), ctype="u32")
    full_bias = _FULL_BIAS.format("map_bias" if full else "map_k")
    ends = _ENDS.replace("maps", "ends" if box else "map")
    products = wgmma_function(tile.keys, q.dtype) + register_product(value, q.dtype)
    return launch(
        "attention", "attention_wgmma.cuh", config, [attended.epilogue()], arguments,
        (blocks, 1, 1), 128 * (tile.consumers + 1), shared,
        Instruction.WGMMA, helpers="".join(
            ('#include "ptx/wgmma_panels.cuh"\n', products, attended.bias_code(), attended.window_code(), full_bias,
             ends, attended.sequences_code())
        ),
    )  # fmt: skip


_FULL_BIAS = """struct FullBias {{
  DEVICE static const TensorMap& map(const Params& p) {{ return p.{}; }}
}};
"""
"""What the kernel reads a full bias through; without one it is not called."""

_ENDS = """struct Ends {
  DEVICE static const TensorMap& q(const Params& p) { return p.maps_q; }
  DEVICE static const TensorMap& k(const Params& p) { return p.maps_k; }
  DEVICE static const TensorMap& v(const Params& p) { return p.maps_v; }
};
"""
"""What it reads the boxes at the ends of packed sequences through; without those it is not called."""


def _bias_arguments(attended: Attended, tile: WgmmaAttentionTile) -> dict[str, Argument]:
    """Boxes of a tile's queries and a panel of its keys, of one head of one of the batch; along what the bias is the
    same for, there is one place."""
    bias, (batch, heads, queries, _) = attended.step.inputs[3], attended.sizes
    itemsize = bias.dtype.itemsize
    panel = (64 if tile.keys * itemsize % 128 else 128) // itemsize
    batch_stride, head_stride, row_stride, _ = attended.bias_strides
    outer = tuple(
        (size, stride) if stride else (1, 16) for size, stride in ((heads, head_stride), (batch, batch_stride))
    )
    return {
        "map_bias": TensorMap(
            pointer_to(bias), queries, attended.keys, row_stride, tile.queries, panel, outer, exact=True
        ),
        "bias_heads": int(head_stride > 0), "bias_batches": int(batch_stride > 0),
    }  # fmt: skip


def map_of(tensor: Tensor, rows: int, padded: int) -> TensorMap:
    """Boxes of `rows` positions and a panel of the `padded` features, of one head of one of the batch."""
    batch, heads, positions, features = four(tensor.shape, 1)
    # Of an axis of one place nothing depends on the stride.
    batch_stride, head_stride, row_stride, _ = (stride or VECTOR for stride in strides(tensor))
    panel = 32 if _padded(padded, 32) % 64 else 64
    outer = ((heads, head_stride), (batch, batch_stride))
    return TensorMap(pointer_to(tensor), positions, features, row_stride, rows, panel, outer)


def register_product(n: int, dtype: DType) -> str:
    """`wgmma<n, T>` with A in registers: d (64 × n, fp32) = a (64 × 16) · b, plus d itself where `accumulate` is not 0.
    b is a descriptor of a tile whose rows are k."""
    count, storage = n // 2, STORAGE[dtype]
    registers = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    parameters = "(float (&d)[{}], const u32 (&a)[4], u64 b, u32 accumulate)"
    return (
        f"template <int N, class T> DEVICE void wgmma{parameters.format('N / 2')};\n"
        f"template <> DEVICE void wgmma<{n}, {storage}>{parameters.format(count)} {{\n"
        f'  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 5}, 0;\\n"\n'
        f'               "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype.value}.{dtype.value} {{{registers}}}, '
        f'{{{a}}}, %{count + 4}, p, 1, 1, 1;\\n}}"\n'
        f'               : {operands} : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));\n}}\n'
    )
