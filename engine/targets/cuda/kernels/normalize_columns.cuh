// Norms and softmax over axes that are not the innermost in memory: neighbouring threads hold neighbouring columns, WIDTH each,
// and walk down `steps` rows, once for the statistics and once to write. The block's threads are `kept_threads` × `row_threads`
// × `column_threads`; row threads share the steps of a column. Few columns are split over blocks as in normalize_long.cuh.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"
#include "scheduler/statistic.cuh"

constexpr int COLUMN_THREADS = config::column_threads, ROW_THREADS = config::row_threads;
constexpr int THREADS = COLUMN_THREADS * ROW_THREADS * config::kept_threads;

// Joins the statistics of a column's row threads: every one of them gets the result.
DEVICE void merge_shares(Value (&shift)[WIDTH], Value (&sum)[WIDTH], Value count, u32 share) {
  if constexpr (ROW_THREADS > 1) {
    __shared__ Value shifts[WIDTH][THREADS], sums[WIDTH][THREADS], counts[THREADS];
    const u32 self = threadIdx.x;
#pragma unroll 1
    for (u32 half = ROW_THREADS / 2; half > 0; half /= 2) {
      if (share >= half && share < 2 * half) {
        counts[self] = count;
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) { shifts[i][self] = shift[i]; sums[i][self] = sum[i]; }
      }
      __syncthreads();
      if (share < half) {
        const u32 other = self + half * COLUMN_THREADS;
        const Value more = counts[other];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          const Statistic joined = merge({shift[i], sum[i], count}, {shifts[i][other], sums[i][other], more});
          shift[i] = joined.shift;
          sum[i] = joined.sum;
        }
        count += more;
      }
    }
    const u32 first = self - share * COLUMN_THREADS;
    if (share == 0) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) { shifts[i][self] = shift[i]; sums[i][self] = sum[i]; }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) { shift[i] = shifts[i][first]; sum[i] = sums[i][first]; }
  }
}

template <class PARAMS> DEVICE void run(const PARAMS& p) {
  const u32 lane = threadIdx.x % COLUMN_THREADS, share = threadIdx.x / COLUMN_THREADS % ROW_THREADS;
  const u32 tile = blockIdx.x / p.splits, split = blockIdx.x - tile * p.splits;
  const u32 row_tile = tile / p.column_tiles;
  const u32 kept = row_tile * config::kept_threads + threadIdx.x / (COLUMN_THREADS * ROW_THREADS);
  const u32 column = ((tile - row_tile * p.column_tiles) * COLUMN_THREADS + lane) * WIDTH;
  const u32 width = kept < p.kept_rows && column < p.columns ? min(static_cast<u32>(WIDTH), p.columns - column) : 0;
  const u32 begin = split * p.per_split, end = width > 0 ? min(begin + p.per_split, p.steps) : 0;
  // Of this thread: a loop that counts them is unrolled with its loads side by side, which one that compares places is not.
  const u32 own = begin + share < end ? (end - begin - share + ROW_THREADS - 1) / ROW_THREADS : 0;

  Value shift[WIDTH], sum[WIDTH], count = 0;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) { shift[i] = nothing().shift; sum[i] = 0; }
  if constexpr (config::joins) {
    for (u32 part = share; part < (width > 0 ? p.splits : 0); part += ROW_THREADS) {
      const Statistic* more = p.partial + (static_cast<i64>(kept) * p.splits + part) * p.columns + column;
      Value counted = 0;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        if (i >= width) continue;
        const Statistic joined = merge({shift[i], sum[i], count}, more[i]);
        shift[i] = joined.shift;
        sum[i] = joined.sum;
        counted = more[i].count;
      }
      count += counted;
    }
  } else {
#pragma unroll 4
    for (u32 i = 0; i < own; ++i) {
      const u32 step = begin + share + i * ROW_THREADS;
      Value v[WIDTH];
      Prologue::load(p, kept * p.steps + step, column, width, v);
      count += Value(1);
      const Value part = KIND == Kind::LAYER ? Value(1) / count : Value(0);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) add_element(shift[i], sum[i], part, v[i]);
    }
  }
  merge_shares(shift, sum, count, share);

  if constexpr (config::writes) {
    Scaling scaling[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) scaling[i] = scaling_of(p, shift[i], sum[i]);
#pragma unroll 2
    for (u32 i = 0; i < own; ++i) {
      const u32 step = begin + share + i * ROW_THREADS;
      Value v[WIDTH];
      Prologue::load(p, kept * p.steps + step, column, width, v);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) v[i] = scaling[i](v[i]);
      Epilogue::store(p, kept * p.steps + step, column, width, v);
    }
  } else if (share == 0) {
    const Value seen = width > 0 ? static_cast<Value>(end - begin) : Value(0);
    Statistic* part = p.partial + (static_cast<i64>(kept) * p.splits + split) * p.columns + column;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      if (i < width) part[i] = {shift[i], sum[i], seen};
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  run(p);
  stamp_end(p.stamp);
}
