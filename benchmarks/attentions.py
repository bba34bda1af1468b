"""What is said of the rows of attention beyond their times: the rate, and what FlashAttention-3 is said to reach."""

from __future__ import annotations

from benchmarks.cases.attention import CASES, FLASH3_TFLOPS, Mask
from benchmarks.results import Row

_CASES = {case.name: case for case in CASES}


def tflops(row: Row) -> float | None:
    """TFLOP/s of both products, as FlashAttention's authors count: of a causal case half. None with a padding mask,
    whose lengths decide what is computed."""
    case = _CASES.get(row.case)
    if case is None or case.mask.is_tensor or not row.ours_us:
        return None
    products = 4 * case.batch * case.heads * case.sequence**2 * case.head
    return products / (2 if case.mask is Mask.CAUSAL else 1) / row.ours_us / 1e6


def flash3_tflops(row: Row) -> float | None:
    """The same of FlashAttention-3, as published."""
    return FLASH3_TFLOPS.get(row.case)
