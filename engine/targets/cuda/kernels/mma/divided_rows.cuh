// Rows of a product's first operand are divided by their standard deviation, which the accumulators are when they are complete. It comes
// from the moments of parts of the rows (scheduler/row_parts.cuh): the four lanes that share rows of a tile read a quarter of the parts
// each. Where consumers take tiles in turn all of that is before their own product, beside the other's. A consumer that multiplies
// without a break only asks for them then, and joins them when the first step of its product is under way.
#pragma once
#include "mma/wgmma_pipeline.cuh"
#include "scheduler/row_parts.cuh"

struct DividedRows {
  static constexpr int ROWS = 2 * PARTS;  // of a lane, eight apart
  // Parts of a row that a lane has at once, as many as there are registers for: all of 1,024 columns, of 768, or some of them.
  static constexpr int BATCH = SPLIT ? 2 : !COOPERATIVE ? 8 : ACCUMULATORS < 96 ? 6 : 4;
  static constexpr bool BESIDE = COOPERATIVE && !SPLIT;
  static constexpr bool CLEARS = !BESIDE && !SPLIT;
  RowPart part[BESIDE ? ROWS : 1][BATCH];
  float factor[ROWS];

  template <class P> DEVICE void begin(const P& p, const Layout& layout) {
    if constexpr (BESIDE) load(p, layout, part, 0);
    else join(p, layout);
  }
  template <class P> DEVICE void finish(const P& p, const Layout& layout) { join(p, layout); }  // where it is BESIDE products
  // An accumulator of the lane's row number `row`.
  DEVICE float quotient(float d, int row) const { return d * factor[row]; }

 private:
  // This lane's parts from `first` on; of rows that do not exist the last one's.
  template <class P> DEVICE static void load(const P& p, const Layout& layout, RowPart (&part)[ROWS][BATCH], u32 first) {
    const u32 parts = row_parts(p.k);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const RowPart* row = p.row_parts + min(layout.first_row + 8 * (r % 2) + 64 * (r / 2), p.m - 1);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const u32 index = min(first + 4 * i + (threadIdx.x & 3), parts - 1);
        part[r][i] = row[static_cast<u64>(index) * p.m];
      }
    }
  }
  template <class P> DEVICE void join(const P& p, const Layout& layout) {
    RowPart now[ROWS][BATCH];
    const u32 parts = row_parts(p.k), quad = threadIdx.x & 3;
    // Around the mean of a row's first part, which is about as far from the row's own mean as those of the others are.
    float pivot[ROWS], sum[ROWS] = {}, squares[ROWS] = {};
    for (u32 first = 0; first < parts; first += 4 * BATCH) {
      if (BESIDE && first == 0) take(now); else load(p, layout, now, first);
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (first == 0) pivot[r] = __shfl_sync(~0u, now[r][0].mean, threadIdx.x & 28);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const u32 index = first + 4 * i + quad;
        const bool present = index < parts;
        const float count = present ? static_cast<float>(part_columns(index, p.k)) : 0.0f;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const float distance = now[r][i].mean - pivot[r];
          sum[r] += count * distance;
          squares[r] += (present ? now[r][i].squares : 0.0f) + count * distance * distance;
        }
      }
    }
    const float share = 1.0f / static_cast<float>(p.k);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int distance = 1; distance <= 2; distance *= 2) {
        sum[r] += __shfl_xor_sync(~0u, sum[r], distance);
        squares[r] += __shfl_xor_sync(~0u, squares[r], distance);
      }
      factor[r] = inverse_root(max_nan(squares[r] - sum[r] * sum[r] * share, 0.0f) * share + p.epsilon);
    }
  }
  DEVICE void take(RowPart (&now)[ROWS][BATCH]) const {
    if constexpr (BESIDE) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int i = 0; i < BATCH; ++i) now[r][i] = part[r][i];
    }
  }
};
