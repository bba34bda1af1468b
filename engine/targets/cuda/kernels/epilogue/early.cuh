// An epilogue whose operands are on their way before the accumulators are there. What is the same in every row (a bias) is fetched
// once for its columns; of what varies from row to row (a residual) the first DEPTH pieces are fetched when the tile begins, and one
// more whenever a piece has been stored: a lane then has DEPTH loads under way all the time, and none of them waits for a product.
//
// A piece is eight neighbouring columns of a row, as in epilogue/fragment.cuh. LAYOUT says what a lane has of a tile:
//   TOTAL pieces, CHUNK of them rearranged at once; FIXED groups of columns, fixed_of(piece) the one that a piece lies in;
//   column(group), columns: where a group starts, and the end of all columns;
//   row(p, piece, row): finds the row of the iteration space, false where there is none;
//   gather(d, first, v): CHUNK pieces of the accumulators;
//   again(): the same, with its rows to be found again, so that those of all pieces do not take registers all the time.
// REGISTERS: what a lane has for operands beside its accumulators.
#pragma once
#include "epilogue/fragment.cuh"
#include "ptx/arithmetic.cuh"

template <class T> constexpr int registers_of() { return __is_empty(T) ? 0 : (sizeof(T) + 3) / 4; }

template <class EPILOGUE, class LAYOUT, int REGISTERS> struct EarlyEpilogue {
  using Fixed = typename EPILOGUE::Fixed;
  using Varying = typename EPILOGUE::Varying;
  static constexpr int TOTAL = LAYOUT::TOTAL, CHUNK = LAYOUT::CHUNK;
  // Fixed operands that leave no room for two varying ones are fetched piece by piece as these are.
  static constexpr int FIXED_REGISTERS = registers_of<Fixed>() * LAYOUT::FIXED;
  static constexpr bool HELD = FIXED_REGISTERS + 2 * CHUNK * registers_of<Varying>() <= REGISTERS;
  static constexpr int ROOM = HELD ? REGISTERS - FIXED_REGISTERS : REGISTERS;
  static constexpr int EACH = registers_of<Varying>() + (HELD ? 0 : registers_of<Fixed>());
  static constexpr int FITTING = EACH == 0 ? TOTAL : ROOM / EACH / CHUNK * CHUNK;
  static constexpr int DEPTH = FITTING < CHUNK ? CHUNK : FITTING > TOTAL ? TOTAL : FITTING;
  static constexpr bool VARIES = registers_of<Varying>() > 0;
  static_assert(TOTAL % CHUNK == 0, "");

  Fixed fixed[HELD ? LAYOUT::FIXED : DEPTH];
  Varying varying[VARIES ? DEPTH : 1];

  // To be called where the columns change.
  DEVICE void begin_columns(const Params& p, const LAYOUT& layout) {
    if constexpr (HELD) {
#pragma unroll
      for (int group = 0; group < LAYOUT::FIXED; ++group) fetch_fixed(p, layout, fixed[group], group);
    }
  }
  // To be called for every tile, after `begin_columns`.
  DEVICE void begin(const Params& p, const LAYOUT& layout) {
#pragma unroll
    for (int piece = 0; piece < DEPTH; ++piece) fetch(p, layout, piece);
  }
  template <class ACCUMULATORS> DEVICE void store(const Params& p, const LAYOUT& begun, const ACCUMULATORS& d) {
#pragma unroll
    for (int first = 0; first < TOTAL; first += CHUNK) {
      const LAYOUT layout = begun.again();
      float v[CHUNK][8];
      layout.gather(d, first, v);
#pragma unroll
      for (int i = 0; i < CHUNK; ++i) {
        const int piece = first + i, group = LAYOUT::fixed_of(piece);
        const u32 c = layout.column(group);
        u32 row;
        if (layout.row(p, piece, row) && c < layout.columns)
          EPILOGUE::store(p, row, c, min(8u, layout.columns - c), v[i], fixed[HELD ? group : piece % DEPTH], varying[VARIES ? piece % DEPTH : 0]);
        if (piece + DEPTH < TOTAL) fetch(p, layout, piece + DEPTH);
      }
    }
  }

 private:
  DEVICE static void fetch_fixed(const Params& p, const LAYOUT& layout, Fixed& into, int group) {
    const u32 c = layout.column(group);
    if (c < layout.columns) into = EPILOGUE::fetch_fixed(p, c, min(8u, layout.columns - c));
  }
  DEVICE void fetch(const Params& p, const LAYOUT& layout, int piece) {
    const int group = LAYOUT::fixed_of(piece);
    if constexpr (!HELD) fetch_fixed(p, layout, fixed[piece % DEPTH], group);
    if constexpr (VARIES) {
      const u32 c = layout.column(group);
      u32 row;
      if (layout.row(p, piece, row) && c < layout.columns)
        varying[piece % DEPTH] = EPILOGUE::fetch_varying(p, row, c, min(8u, layout.columns - c));
    }
  }
};

// PARTS fragments of 64 rows a warpgroup, of BLOCKS 8-column blocks: what their pieces are, but for their rows. `first` is the first
// column, `columns` the end of all.
template <int PARTS, int BLOCKS> struct FragmentPieces {
  static_assert(BLOCKS % 4 == 0, "four lanes hold the columns of four blocks");
  static constexpr int PIECES = BLOCKS / 2, TOTAL = PARTS * PIECES, CHUNK = 1, FIXED = BLOCKS / 4;
  u32 first, columns;
  DEVICE static constexpr int fixed_of(int piece) { return piece % PIECES / 2; }
  DEVICE static constexpr int row_of(int piece) { return 64 * (piece / PIECES) + 8 * (piece % 2); }  // beside the lane's first
  DEVICE u32 column(int group) const { return first + 32 * group + 8 * (threadIdx.x & 3); }
  DEVICE void gather(const float (&d)[PARTS][4 * BLOCKS], int piece, float (&v)[1][8]) const {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[0][j] = d[piece / PIECES][(4 * fixed_of(piece) + j / 2) * 4 + 2 * (piece % 2) + j % 2];
    transpose_quad(v[0], threadIdx.x & 3);
  }
};
// The same where rows are neighbours: the lane's first one is `row`, the end of all `rows`.
template <int PARTS, int BLOCKS> struct NeighbouringRows : FragmentPieces<PARTS, BLOCKS> {
  u32 first_row, rows;
  DEVICE NeighbouringRows(u32 column, u32 columns, u32 row, u32 rows)
      : FragmentPieces<PARTS, BLOCKS>{column, columns}, first_row(row), rows(rows) {}
  DEVICE NeighbouringRows again() const { return {this->first, this->columns, unknown(first_row), rows}; }
  DEVICE bool row(const Params&, int piece, u32& found) const {
    found = first_row + FragmentPieces<PARTS, BLOCKS>::row_of(piece);
    return found < rows;
  }
};
