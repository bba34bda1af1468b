// Norms and softmax of rows that fit in no block's registers: a block walks over a row once for its statistic and once to write
// it. Few rows are split over blocks: one launch leaves the statistics of the parts in `partial`, the next joins them and
// writes. A row is `steps` pieces of `columns` neighbouring elements, `chunks` vectors each.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"
#include "scheduler/statistic.cuh"

constexpr int THREADS = config::threads;

template <class PARAMS> DEVICE void run(const PARAMS& p) {
  const u32 row = blockIdx.x / p.splits, split = blockIdx.x - row * p.splits;
  const u32 begin = split * p.per_split, end = min(begin + p.per_split, p.steps * p.chunks);
  const auto each = [&](auto&& visit) {
    // A loop that counts is unrolled with its loads side by side, which one that compares places is not.
    const u32 own = begin + threadIdx.x < end ? (end - begin - threadIdx.x + THREADS - 1) / THREADS : 0;
#pragma unroll 4
    for (u32 j = 0; j < own; ++j) {
      const u32 i = begin + threadIdx.x + j * THREADS;
      const u32 step = config::stepped ? i / p.chunks : 0, column = (i - step * p.chunks) * WIDTH;
      const u32 at = config::stepped ? row * p.steps + step : row, count = min(static_cast<u32>(WIDTH), p.columns - column);
      Value v[WIDTH];
      Prologue::load(p, at, column, count, v);
      visit(at, column, count, v);
    }
  };

  Statistic s = nothing();
  if constexpr (config::joins) {
    for (u32 i = threadIdx.x; i < p.splits; i += THREADS) s = merge(s, p.partial[row * p.splits + i]);
  } else {
    each([&](u32, u32, u32 count, const Value (&v)[WIDTH]) { add_elements(s, v, count); });
  }
  s = merge_block<THREADS>(s);
  if constexpr (config::writes) {
    const Scaling scaling = scaling_of(p, s.shift, s.sum);
    each([&](u32 at, u32 column, u32 count, Value (&v)[WIDTH]) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) v[i] = scaling(v[i]);
      Epilogue::store(p, at, column, count, v);
    });
  } else if (threadIdx.x == 0) {
    p.partial[blockIdx.x] = s;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  run(p);
  stamp_end(p.stamp);
}
