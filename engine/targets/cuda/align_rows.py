"""The rows of a product's first operand, copied to where the copy engine reads them at full rate (align_rows.cuh), or
as the parts that wgmma multiplies (split_rows.cuh): one read and one write of it. Called by `gemm.py`."""

from __future__ import annotations

from dataclasses import replace

from engine.ir.dtype import DType
from engine.targets.cuda.kernel import I64, STORAGE, Launch, Pointer, WeightStore, ceildiv, launch
from engine.targets.cuda.product import PART_COLUMNS, Matrix, Product, columns_in_parts, in_parts, line_elements

_THREADS = 256
_BATCH = 2  # rows of which a thread loads a chunk before it stores the first
_CHUNK, _MOST_LANES = 16, 32  # bytes, and the threads that share a row where there are more rows than blocks
_BLOCKS = 8  # of a multiprocessor: all of its threads
_PIECES = {1: "u8", 2: "u16", 4: "u32", 16: "uint4"}


def aligned_bytes(product: Product) -> int:
    """What the copy takes."""
    return product.m * line_elements(product.k, product.dtype) * product.dtype.itemsize


def aligned(product: Product, scratch: Pointer, multiprocessors: int) -> tuple[Launch, Product]:
    """The launch that copies a to `scratch`, and the product that reads it there. The rows of a are its lines, and
    there is one matrix of it."""
    a, stride = product.a, line_elements(product.k, product.dtype)
    copied = replace(scratch, ctype=STORAGE[product.dtype])
    chunks = ceildiv(product.k * product.dtype.itemsize, _CHUNK)  # of a row
    most = _BLOCKS * multiprocessors
    few = product.m <= most
    batch, lanes = 1 if few else _BATCH, min(_THREADS if few else _MOST_LANES, 1 << (chunks - 1).bit_length())
    blocks = min(ceildiv(product.m * lanes, _THREADS * batch), most)
    beside = min(ceildiv(chunks, lanes), max(1, most // blocks))
    copy = launch(
        "gemm",
        "align_rows.cuh",
        {"operand": STORAGE[product.dtype], "lanes": lanes, "threads": _THREADS, "batch": batch},
        [],
        {
            "source": a.pointer, "source_stride": I64(a.stride), "rows_out": copied, "out_stride": I64(stride),
            "rows": product.m, "k": product.k,
        },
        (blocks, beside, 1),
        _THREADS,
    )  # fmt: skip
    return copy, replace(product, a=Matrix(copied, stride, padded=True))


def split_bytes(product: Product) -> int:
    """What the parts take."""
    return product.m * columns_in_parts(product.k) * DType.BF16.itemsize


def split(product: Product, scratch: Pointer, weights: WeightStore, multiprocessors: int) -> tuple[Launch, Product]:
    """The launch that leaves the parts of a at `scratch`, and the product of the parts of both operands. They are of
    fp32; the rows of a are its lines, there is one matrix of it, and b is a constant whose columns are lines."""
    a, columns = product.a, columns_in_parts(product.k)
    parts = replace(scratch, ctype=STORAGE[DType.BF16])
    eights = product.m * ceildiv(product.k, PART_COLUMNS) * PART_COLUMNS // 8
    made = launch(
        "gemm",
        "split_rows.cuh",
        {"piece": _PIECES[product.a_access], "threads": _THREADS},
        [],
        {
            "source": a.pointer, "source_stride": I64(a.stride), "rows_out": parts, "out_stride": I64(columns),
            "rows": product.m, "k": product.k,
        },
        (min(ceildiv(eights, _THREADS), _BLOCKS * multiprocessors), 1, 1),
        _THREADS,
    )  # fmt: skip
    return made, in_parts(replace(product, a=Matrix(parts, columns, padded=True)), weights)
