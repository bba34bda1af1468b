"""Attention on sm_90a (attention_wgmma.cuh): operands through the copy engine, products on whole warpgroups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.ir.dtype import DType
from engine.plan.plan import Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.attention_operands import Attended, BiasKind, four, strides
from engine.targets.cuda.gemm import wgmma_function
from engine.targets.cuda.kernel import (
    STORAGE,
    Argument,
    Context,
    Instruction,
    Launch,
    TensorMap,
    ceildiv,
    launch,
    pointer_to,
)
from engine.targets.cuda.spaces import VECTOR

_WIDTHS = (32, 64, 128)  # features of a head, padded by zeros that the copy engine supplies
_MIN_QUERIES = 17  # up to 16 the portable kernel wastes fewer rows, and deals the keys to several blocks
_Q_STAGES = 2


@dataclass(frozen=True)
class WgmmaAttentionTile:
    """A block: `consumers` warpgroups of 64 queries and one that fills rings of `stages` tiles of `keys` keys. `blocks`
    blocks share a multiprocessor; registers are those of a thread."""

    consumers: int
    keys: int
    stages: int
    blocks: int
    producer_registers: int
    consumer_registers: int

    @property
    def queries(self) -> int:
        return 64 * self.consumers

    def shared_bytes(self, head: int, value: int) -> int:
        """Tiles of q, rings of k and v, the biases beside k, and the barriers (attention_wgmma.cuh)."""
        tiles = _Q_STAGES * self.queries * head * 2 + self.stages * self.keys * (head + value) * 2
        return tiles + self.stages * self.keys * 4 + 8 * (2 * _Q_STAGES + 4 * self.stages)


def suits(step: Step) -> bool:
    """Whether the copy engine can read q, k and v, and the kernel has what the operator asks."""
    attended = Attended(step)
    return (
        step.inputs[0].dtype in (DType.F16, DType.BF16)
        and attended.bias is not BiasKind.FULL
        and attended.op.scale > 0  # it meets the scores behind the maximum
        and attended.sizes[2] >= _MIN_QUERIES
        and all(_readable(tensor) for tensor in step.inputs[:3])
    )


def _readable(tensor: Tensor) -> bool:
    """Starts and strides are whole, positive chunks of 16 bytes, and no axis is empty."""
    *outer, _ = zip(tensor.shape, tensor.strides, strict=True)
    return (
        0 < tensor.shape[-1] <= _WIDTHS[-1]
        and tensor.offset % VECTOR == 0
        and all(size == 1 or (size > 0 and stride > 0 and stride % VECTOR == 0) for size, stride in outer)
    )


def candidates(head: int, value: int, crowded: bool) -> Iterator[WgmmaAttentionTile]:
    """Tiles whose kernels have no spills; `head` and `value` are padded. A block starts with as many registers a thread
    as its launch bounds allow; producer and consumers divide those anew. `crowded`: both a bias and a causal mask need
    some of them."""
    if max(head, value) <= 64:
        if not crowded:
            yield WgmmaAttentionTile(3, 128, 2, 1, 32, 160)
        yield WgmmaAttentionTile(2, 128, 4, 1, 40, 232)
        yield WgmmaAttentionTile(1, 128, 2, 2, 40, 208)
    else:
        yield WgmmaAttentionTile(2, 128, 2, 1, 40, 232)
        yield WgmmaAttentionTile(1, 64, 2, 2, 40, 208)


def padded(tensor: Tensor) -> int:
    return next(width for width in _WIDTHS if width >= tensor.shape[-1])


def pick(step: Step, context: Context) -> WgmmaAttentionTile:
    """The tile with the least estimated time."""
    head, value = padded(step.inputs[0]), padded(step.inputs[2])
    op = Attended(step).op
    every = candidates(head, value, op.causal and op.has_bias)
    return min(every, key=lambda tile: _cycles(step, tile, head, value, context.multiprocessors))


def _cycles(step: Step, tile: WgmmaAttentionTile, head: int, value: int, multiprocessors: int) -> float:
    """Estimated cycles. Rates a multiprocessor: multiply-adds as in tiles.py, slowed down by what the softmax leaves
    (three quarters of the product's rate at 64 features); 16 exponentials."""
    rate, exponentials, latency, launch = 0.75 * 2048, 16, 900, 2750
    attended = Attended(step)
    batch, heads, queries, _ = attended.sizes
    keys, query_tiles = attended.keys, ceildiv(queries, tile.queries)
    items = query_tiles * heads * batch
    if attended.op.causal:
        keys = ceildiv(sum(min(keys, (i + 1) * tile.queries) for i in range(query_tiles)), query_tiles)
    scores = tile.queries * tile.keys
    rounds = ceildiv(items, multiprocessors)
    resident = min(rounds, tile.blocks)
    tile_of_keys = max(scores * (head + value) / rate, scores / exponentials, latency / resident)
    ends = latency / resident + tile.queries * (head + value) / 24  # first loads and stores: bytes from L2 a cycle
    return launch + rounds * (ceildiv(keys, tile.keys) * tile_of_keys + ends)


def launch_attention(step: Step, tile: WgmmaAttentionTile, context: Context) -> Launch:
    """The launch of an attention that `suits`, in the given tile."""
    attended, (q, k, v) = Attended(step), step.inputs[:3]
    op, (batch, heads, queries, _) = attended.op, attended.sizes
    head, value = padded(q), padded(v)
    shared = tile.shared_bytes(head, value)
    config: dict[str, int | bool | str] = {
        "operand": STORAGE[q.dtype], "head_padded": head, "value_padded": value, "keys": tile.keys,
        "consumers": tile.consumers, "stages": tile.stages, "causal": op.causal, "bias": op.has_bias,
        "masked_rows_zero": op.masked_rows_zero, "producer_registers": tile.producer_registers,
        "consumer_registers": tile.consumer_registers, "blocks": tile.blocks, "shared_bytes": shared,
    }  # fmt: skip
    arguments: dict[str, Argument] = {
        "map_q": _map(q, tile.queries), "map_k": _map(k, tile.keys), "map_v": _map(v, tile.keys),
        **attended.arguments(), "groups": batch * heads,
        # 0 where all of the batch read the same.
        "q_batches": int(q.shape[0] > 1), "k_batches": int(k.shape[0] > 1), "v_batches": int(v.shape[0] > 1),
    }  # fmt: skip
    items = ceildiv(queries, tile.queries) * heads * batch
    products = wgmma_function(tile.keys, q.dtype) + register_product(value, q.dtype)
    return launch(
        "attention", "attention_wgmma.cuh", config, [attended.epilogue()], arguments,
        (min(items, context.multiprocessors * tile.blocks), 1, 1), 128 * (tile.consumers + 1), shared,
        Instruction.WGMMA, helpers=f'#include "ptx/wgmma_panels.cuh"\n{products}{attended.bias_code()}',
    )  # fmt: skip


def _map(tensor: Tensor, rows: int) -> TensorMap:
    """Boxes of `rows` positions and a panel of features, of one head of one of the batch."""
    batch, heads, positions, features = four(tensor.shape, 1)
    # Of an axis of one place nothing depends on the stride.
    batch_stride, head_stride, row_stride, _ = (stride or VECTOR for stride in strides(tensor))
    panel = min(padded(tensor), 64)
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
