"""The rows of a product's first operand, copied to where the copy engine reads them at full rate (align_rows.cuh): one
read and one write of it. Called by `gemm.py`, where the product gains more than that."""

from __future__ import annotations

from dataclasses import replace

from engine.plan.tensor import Buffer
from engine.targets.cuda.kernel import I64, STORAGE, Launch, Pointer, ceildiv, launch
from engine.targets.cuda.product import Matrix, Product, line_elements

_THREADS = 256
_BATCH = 2  # chunks of 16 bytes that a thread loads before it stores the first
_BLOCKS = 8  # of a multiprocessor: all of its threads
_PIECES = {2: "u16", 4: "u32", 16: "uint4"}


def aligned_bytes(product: Product) -> int:
    """What the copy takes."""
    return product.m * line_elements(product.k, product.dtype) * product.dtype.itemsize


def aligned(product: Product, scratch: Buffer, multiprocessors: int) -> tuple[Launch, Product]:
    """The launch that copies a to the start of `scratch`, and the product that reads it there. The rows of a are its
    lines, and there is one matrix of it."""
    a, stride = product.a, line_elements(product.k, product.dtype)
    copied = Pointer(scratch, ctype=STORAGE[product.dtype])
    access = product.a_access
    chunks = product.m * ceildiv(product.k * product.dtype.itemsize, 16)
    blocks = min(ceildiv(chunks, _THREADS * _BATCH), _BLOCKS * multiprocessors)
    copy = launch(
        "gemm",
        "align_rows.cuh",
        {"operand": STORAGE[product.dtype], "piece": _PIECES[access], "threads": _THREADS, "batch": _BATCH},
        [],
        {
            "source": a.pointer, "source_stride": I64(a.stride), "rows_out": copied, "out_stride": I64(stride),
            "rows": product.m, "k": product.k,
        },
        (blocks, 1, 1),
        _THREADS,
    )  # fmt: skip
    return copy, replace(product, a=Matrix(copied, stride, padded=True))
