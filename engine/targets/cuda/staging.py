"""Epilogues of products whose results go to memory through shared memory and the copy engine (kernels/mma/staging.cuh).

There the engine brings and takes whole panels, so an epilogue has no addresses: it computes two neighbouring columns of
a row from the accumulators, from operands that are the same in every row or the same in every column, and from at most
one full tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from engine.ir import expr as ex
from engine.ir.dtype import DType
from engine.targets.cuda.codegen import BOUNDED, bounds_of, column_kind, indented, loop_over
from engine.targets.cuda.kernel import STORAGE, Argument, RowMatrix, Staged, TensorArgument, ceildiv
from engine.targets.cuda.spaces import Operand, Space

STAGED_WIDTH = 2
"""Neighbouring columns that a lane's accumulators hold."""
_FIXED_REGISTERS, _BESIDE_ROWS = 3, 4
"""Registers of two columns of all that is the same in every row; more would not fit beside the accumulators. The second
number: of what a residual is normalised and shifted by, and the bias."""
_NORMALISING = 5
"""Operations of such an epilogue at most: others are not staged."""
_ROW_OPERANDS = 2
"""What it reads of rows, a number of fp32 each: a factor and an offset."""


def staged_epilogue(
    stores: Sequence[ex.Expr], space: Space, inputs: Mapping[int, Operand], outputs: Sequence[Operand], granularity: int
) -> Staged | None:
    """The staged form of an epilogue of fp32 accumulators; None where it has none: more than one result, or one that is
    not of 16 bits, rows in several levels, more operands than there are registers for, or one looked up in a table, or
    a full tile beside rows that the copy engine cannot write."""
    fixed = {i: operand for i, operand in inputs.items() if operand.index is None and not any(operand.strides[:-1])}
    rows = {i: operand for i, operand in inputs.items() if i not in fixed and _is_of_rows(operand)}
    tiles = {i: operand for i, operand in inputs.items() if i not in fixed and i not in rows}
    if len(outputs) != 1 or len(tiles) > 1 or prod(space.levels[:-1]) != 1:
        return None
    if _registers(fixed) > (_BESIDE_ROWS if rows else _FIXED_REGISTERS):
        return None
    if rows and (len(rows) > _ROW_OPERANDS or not tiles or ex.flops(*stores) > _NORMALISING):
        return None
    (output,) = outputs
    if not all(_as_rows(operand, space, granularity) for operand in tiles.values()):
        return None
    ragged = not _as_rows(output, space, granularity)
    if ragged and (tiles or not _as_ragged_rows(output)):
        return None
    if any(leaf.dtype is not DType.F32 for leaf in ex.walk(*stores) if isinstance(leaf, ex.Acc)):
        return None
    arguments: dict[str, Argument] = {
        f"epilogue_{i}": TensorArgument(operand.pointer, operand.strides[:-1], operand.strides[-1])
        for i, operand in fixed.items()
    }
    arguments |= {f"epilogue_{i}": operand.pointer for i, operand in rows.items()}
    code = _code(stores[0], space, fixed, rows, tiles, output.dtype, granularity)
    read = next((_rows(operand, space) for operand in tiles.values()), None)
    return Staged(code, tuple(arguments.items()), _rows(output, space), read, bool(rows), ragged)


def _is_of_rows(operand: Operand) -> bool:
    """Whether it is a number of fp32 for each row, one after the other."""
    return operand.dtype is DType.F32 and operand.index is None and operand.strides[-2:] == (1, 0)


def _as_rows(operand: Operand, space: Space, granularity: int) -> bool:
    """Whether the copy engine can read or write it in whole rows of 16-bit elements."""
    aligned = operand.dtype in (DType.F16, DType.BF16) and space.is_aligned(operand, granularity)
    return aligned and operand.index is None


def _as_ragged_rows(operand: Operand) -> bool:
    """Whether consumers can store it: neighbouring 16-bit elements, in rows that begin anywhere."""
    return operand.dtype in (DType.F16, DType.BF16) and operand.strides[-1] == 1 and operand.index is None


def _rows(operand: Operand, space: Space) -> RowMatrix:
    return RowMatrix(operand.pointer, operand.strides[-2] or space.columns)  # a single row is no distance from another


def _registers(fixed: Mapping[int, Operand]) -> int:
    """Of the struct that holds them: beside members of eight bytes it ends at a multiple of eight."""
    each = [ceildiv((STAGED_WIDTH if o.strides[-1] else 1) * o.dtype.itemsize, 4) for o in fixed.values()]
    return ceildiv(sum(each), 2) * 2 if 2 in each else sum(each)


def _code(
    store: ex.Expr,
    space: Space,
    fixed: Mapping[int, Operand],
    rows: Mapping[int, Operand],
    tiles: Mapping[int, Operand],
    result: DType,
    granularity: int,
) -> str:
    """`Epilogue` as kernels/mma/staging.cuh asks for it."""

    def members(operands: Mapping[int, Operand]) -> str:
        return " ".join(f"Fetched<{STORAGE[o.dtype]}, {column_kind(o)}> a{i};" for i, o in operands.items())

    fetches = [
        f"fixed.a{i} = fetch_columns<{STORAGE[o.dtype]}, {column_kind(o)}, "
        f"{'true' if space.is_aligned(o, granularity) else 'false'}>(p.epilogue_{i}, 0, column, count);"
        for i, o in fixed.items()
    ]
    # The two elements of a word of the tile.
    words = [
        f"inputs.a{i}.pack.element[{half}] = {STORAGE[o.dtype]}{{static_cast<u16>({word})}};"
        for i, o in tiles.items()
        for half, word in enumerate(("tile", "tile >> 16"))
    ]
    places = [
        f"static_cast<const {STORAGE[o.dtype]}*>(p.epilogue_{i}.data) + column"
        for i, o in fixed.items()
        if o.strides[-1] == 1
    ]
    chosen = [f"if (which == {number}) place = {place};" for number, place in enumerate(places) if number]
    touches = [f"const void* place = {places[0]};", *chosen, "touch(place);"] if places else []
    shuffles = [f"row.a{i}.element = __shfl_sync(~0u, row.a{i}.element, lane, 4);" for i in rows]
    bounds, values = bounds_of(store), {"result[i]": (store, result)}
    if bounds:
        values = {"unbounded[i]": (bounds.bounded, result), **values}
    loop = loop_over(values, halves=STORAGE[result])
    word = loop.word or f"pack_pair<{STORAGE[result]}>(result[0], result[1])"
    if bounds:
        word = f"bounded_pair<{STORAGE[result]}, {bounds.most:#x}>(unbounded[0], unbounded[1])"
    declared = ["float unbounded[WIDTH];"] if bounds else []
    lines = ["Inputs inputs{fixed, row, {}};", *words, *declared, *loop.lines, f"return {word};"]
    return (
        f"{BOUNDED if bounds else ''}"
        '#include "epilogue/gelu.cuh"\n#include "ptx/pack.cuh"\n#include "ptx/prefetch.cuh"\n'
        "struct Epilogue {\n"
        f"  using Result = {STORAGE[result]};\n"
        f"  static constexpr bool READS_TILE = {'true' if tiles else 'false'};\n"
        f"  static constexpr bool READS_ROWS = {'true' if rows else 'false'};\n"
        f"  struct Fixed {{ {members(fixed)} }};\n"
        f"  struct OfRow {{ {members(rows)} }};\n"
        f"  struct Tile {{ {members(tiles)} }};\n"
        "  struct Inputs : Fixed, OfRow, Tile {};\n"
        "  DEVICE static Fixed fetch_fixed(const Params& p, u32 column, u32 count) {\n"
        f"{indented(['Fixed fixed;', *fetches, 'return fixed;'])}\n  }}\n"
        "  // Of an operand that lies along the columns, by its number, or of the first.\n"
        f"  DEVICE static void touch_fixed(const Params& p, u32 which, u32 column) {{\n{indented(touches)}\n  }}\n"
        "  DEVICE static OfRow fetch_row(const Params& p, u32 row) {\n"
        f"{indented(['OfRow found;', *(f'found.a{i}.element = p.epilogue_{i}[row];' for i in rows), 'return found;'])}"
        "\n  }\n"
        "  // That of one of four lanes.\n"
        "  DEVICE static OfRow shuffled(OfRow row, u32 lane) {\n"
        f"{indented([*shuffles, 'return row;'])}"
        "\n  }\n"
        "  // Both rounded, and as they are before.\n"
        "  DEVICE static u32 results(\n"
        "    const float (&acc)[WIDTH], const Fixed& fixed, const OfRow& row, u32 tile, float (&result)[WIDTH]) {\n"
        f"{indented(lines)}\n  }}\n"
        "};\n"
    )
