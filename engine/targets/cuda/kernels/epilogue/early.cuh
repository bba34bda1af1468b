// An epilogue whose operands are on their way before the accumulators are there. What is the same in every row (a bias) is fetched
// once for its columns; of what varies from row to row (a residual) the first DEPTH pieces are fetched when the tile begins, and one
// more whenever a piece has been stored: a lane then has DEPTH loads under way all the time, and none of them waits for a product.
//
// A piece is eight neighbouring columns of a row, as in epilogue/fragment.cuh. LAYOUT says what a lane has of a tile:
//   TOTAL pieces, CHUNK of them rearranged at once, TOGETHER before the first of these is stored; FIXED groups of columns,
//   fixed_of(piece) the one that a piece lies in;
//   column(group), columns: where a group starts, and the end of all columns;
//   row(p, piece, row): finds the row of the iteration space, false where there is none;
//   gather(d, first, v): CHUNK pieces of the accumulators; where they are BLOCKS_OF_ROWS, as in epilogue/fragment.cuh,
//   rounded(d, piece): the same of one, rounded to 16 bits;
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
  // Pieces that are rearranged before the first is stored. NOTES: with a residual, 128 columns and memory as the limit (401408×256×64 on an
  // H100) all of them at once took 6 % longer than one by one; tiles of 64, 96 and 160 columns took 2 to 4 % less.
  static constexpr int GROUP = EPILOGUE::SHIFTED || (VARIES && LAYOUT::FIXED % 4 == 0) ? CHUNK : LAYOUT::TOGETHER;

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
  // Lanes wait for each other once for each GROUP, and branch nowhere within. Where there are registers for a CHUNK only, a branch keeps
  // the compiler from finding the rows of all of them beforehand.
  template <class ACCUMULATORS> DEVICE void store(const Params& p, const LAYOUT& begun, const ACCUMULATORS& d) {
#pragma unroll
    for (int begin = 0; begin < TOTAL; begin += GROUP) {
      const LAYOUT layout = begun.again();
      constexpr bool ROUNDED = EPILOGUE::ROUNDS && LAYOUT::BLOCKS_OF_ROWS;
      uint4 rounded[GROUP];
      float v[GROUP / CHUNK][CHUNK][8];
#pragma unroll
      for (int i = 0; i < GROUP && begin + i < TOTAL; i += CHUNK) {
        if constexpr (ROUNDED) rounded[i] = LAYOUT::template rounded<typename EPILOGUE::Rounded>(d, begin + i);
        else layout.gather(d, begin + i, v[i / CHUNK]);
      }
#pragma unroll
      for (int i = 0; i < GROUP && begin + i < TOTAL; ++i) {
        const int piece = begin + i, group = LAYOUT::fixed_of(piece);
        const u32 c = layout.column(group);
        u32 row;
        const bool present = layout.row(p, piece, row) && c < layout.columns;
        if constexpr (ROUNDED) {
          store_global_16_if(present, EPILOGUE::place(p, EPILOGUE::to(p, row), c), rounded[i]);
        } else {
          const auto& of_columns = fixed[HELD ? group : piece % DEPTH];
          const auto& of_row = varying[VARIES ? piece % DEPTH : 0];
          const u32 count = present ? min(8u, layout.columns - c) : 0;
          if (GROUP > CHUNK || present) EPILOGUE::store(p, row, c, count, v[i / CHUNK][i % CHUNK], of_columns, of_row);
          if (piece + DEPTH < TOTAL) fetch(p, layout, piece + DEPTH);
        }
      }
    }
  }

 private:
  DEVICE static void fetch_fixed(const Params& p, const LAYOUT& layout, Fixed& into, int group) {
    const u32 c = column_there(layout.column(group), layout.columns);
    into = EPILOGUE::fetch_fixed(p, c, min(8u, layout.columns - c));
  }
  DEVICE void fetch(const Params& p, const LAYOUT& layout, int piece) {
    const int group = LAYOUT::fixed_of(piece);
    if constexpr (!HELD) fetch_fixed(p, layout, fixed[piece % DEPTH], group);
    if constexpr (VARIES) {
      const u32 c = column_there(layout.column(group), layout.columns);
      u32 row;
      if (!layout.row(p, piece, row)) row = 0;
      varying[piece % DEPTH] = EPILOGUE::fetch_varying(p, row, c, min(8u, layout.columns - c));
    }
  }
};

// PARTS fragments of 64 rows a warpgroup, of BLOCKS 8-column blocks: what their pieces are, but for their rows. `first` is the first
// column, `columns` the end of all.
template <int PARTS, int BLOCKS> struct FragmentPieces {
  static_assert(BLOCKS % 4 == 0, "four lanes hold the columns of four blocks");
  static constexpr int PIECES = BLOCKS / 2, TOTAL = PARTS * PIECES, CHUNK = 1, FIXED = BLOCKS / 4;
  static constexpr int TOGETHER = TOTAL <= 8 ? TOTAL : 2;  // many accumulators leave few registers
  static constexpr bool BLOCKS_OF_ROWS = true;
  u32 first, columns;
  DEVICE static constexpr int fixed_of(int piece) { return piece % PIECES / 2; }
  DEVICE static constexpr int row_of(int piece) { return 64 * (piece / PIECES) + 8 * (piece % 2); }  // beside the lane's first
  DEVICE u32 column(int group) const { return first + 32 * group + 8 * (threadIdx.x & 3); }
  DEVICE void gather(const float (&d)[PARTS][4 * BLOCKS], int piece, float (&v)[1][8]) const {
    piece_of<Arrangement::BLOCKS>(v[0], d[piece / PIECES], piece % PIECES);
  }
  template <class T> DEVICE static uint4 rounded(const float (&d)[PARTS][4 * BLOCKS], int piece) {
    return rounded_piece<T>(d[piece / PIECES], piece % PIECES);
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
