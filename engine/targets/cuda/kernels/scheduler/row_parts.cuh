// The moments of a row by parts of 32 columns, as the operator RowMoments has them: the mean of a part and the squares around it. Whole
// rows follow from them without cancellation. In memory a part of all rows comes after the other: eight rows lie in two sectors.
#pragma once
#include "epilogue/math.cuh"

struct alignas(8) RowPart { float mean, squares; };
constexpr u32 PART_COLUMNS = 32;

DEVICE u32 row_parts(u32 columns) { return (columns + PART_COLUMNS - 1) / PART_COLUMNS; }
// The columns that `part` has of so many.
DEVICE u32 part_columns(u32 part, u32 columns) { return min(PART_COLUMNS, columns - part * PART_COLUMNS); }
