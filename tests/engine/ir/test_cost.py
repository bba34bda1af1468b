"""FLOPs and bytes of the operators against counts by hand."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dtype import DType


@dataclass(frozen=True)
class T:
    """A concrete shape of fp32."""

    shape: tuple[int, ...]
    dtype: DType = DType.F32

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


def conv(kernel: int, stride: int, pad: int = 0, groups: int = 1) -> ops.Conv:
    return ops.Conv((stride, stride), ((pad, pad), (pad, pad)), (1, 1), groups)


def test_gemm_counts_multiply_adds_and_its_epilogue() -> None:
    bias = ex.apply(ex.PointOp.ADD, ex.Acc(), ex.Arg(2, DType.F32))
    cost = ops.Gemm((bias,)).cost([T((4, 8)), T((8, 16)), T((16,))], [T((4, 16))])
    assert cost.flops == 2 * 4 * 8 * 16 + 4 * 16
    assert cost.bytes == 4 * (4 * 8 + 8 * 16 + 16 + 4 * 16)


def test_grouped_convolution_counts_its_own_channels_only() -> None:
    x, w, y = T((2, 32, 10, 10)), T((32, 1, 3, 3)), T((2, 32, 10, 10))
    assert conv(3, 1, 1, groups=32).flops([x, w], [y]) == 2 * 2 * 32 * 100 * 9


def test_strided_pointwise_convolution_reads_every_fourth_pixel() -> None:
    x, w, y = T((1, 16, 8, 8)), T((4, 16, 1, 1)), T((1, 4, 4, 4))
    assert conv(1, 2).bytes([x, w], [y]) == 4 * (16 * 4 * 4 + 4 * 16 + 4 * 16)


def test_dilated_convolution_reads_what_its_taps_reach() -> None:
    op = ops.Conv((4,), ((0, 0),), (2,))
    # Outputs at 0 and 4, taps at 0 and 2: positions 0, 2, 4 and 6 of 7.
    assert op.bytes([T((1, 1, 7)), T((1, 1, 2))], [T((1, 1, 2))]) == 4 * (4 + 2 + 2)


def test_causal_attention_counts_the_lower_triangle() -> None:
    q = T((1, 2, 4, 8))
    full = ops.Attention(1.0).flops([q, q, q], [q])
    causal = ops.Attention(1.0, causal=True).flops([q, q, q], [q])
    assert full == 2 * 16 * (2 * 8 + 2 * 8 + 5)
    assert causal == full * 10 // 16


def test_attention_in_a_window_counts_what_it_shows() -> None:
    q, k = T((1, 2, 4, 8)), T((1, 2, 3, 8))
    score = 2 * (2 * 8 + 2 * 8 + 5)  # of both heads
    assert ops.Attention(1.0, causal=True, window=2).flops([q, q, q], [q]) == 7 * score
    assert ops.Attention(1.0, window=2).flops([q, q, q], [q]) == 10 * score
    assert ops.Attention(1.0, causal=True, window=9).flops([q, q, q], [q]) == 10 * score
    assert ops.Attention(1.0, causal=True, window=1).flops([q, k, k], [q]) == 3 * score, "the last query sees no key"


def test_packed_attention_counts_equal_lengths() -> None:
    q, starts = T((1, 2, 12, 8)), T((4,), DType.I32)
    full = ops.Attention(1.0, packed=True).flops([q, q, q, starts], [q])
    causal = ops.Attention(1.0, causal=True, packed=True).flops([q, q, q, starts], [q])
    assert full == 2 * 12 * 4 * (2 * 8 + 2 * 8 + 5)
    assert causal == full * 10 // 16


def test_embedding_reads_the_rows_it_looks_up() -> None:
    lookup = ops.Pointwise((ex.Arg(0, DType.F32),), gathers=((0, 1),))
    table, ids, y = T((30000, 8)), T((5,), DType.I64), T((5, 8))
    assert lookup.bytes([table, ids], [y]) == 5 * 8 * 4 + 5 * 8 + 5 * 8 * 4
