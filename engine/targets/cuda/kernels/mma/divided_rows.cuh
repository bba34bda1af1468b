// Rows of a product's first operand are divided by their standard deviation, which the accumulators are when they are complete: each is
// multiplied by its row's factor (scheduler/row_moments.cuh), that a lane has fetched when the tile began.
#pragma once
#include "mma/wgmma_pipeline.cuh"

struct DividedRows {
  static constexpr bool DIVIDES = true;
  float factor[2 * PARTS];  // of a lane's rows, eight apart

  // Of rows that do not exist the last one's. P: Params, which has `row_factors` only here.
  template <class P> DEVICE void begin(const P& p, const Layout& layout) {
#pragma unroll
    for (int r = 0; r < 2 * PARTS; ++r) factor[r] = p.row_factors[min(layout.first_row + 8 * (r % 2) + 64 * (r / 2), p.m - 1)];
  }
  // Of one row.
  template <class P> DEVICE static float factor_of(const P& p, u32 row) { return p.row_factors[min(row, p.m - 1)]; }
  // An accumulator of the lane's row number `row`.
  DEVICE float quotient(float d, int row) const { return d * factor[row]; }
};
