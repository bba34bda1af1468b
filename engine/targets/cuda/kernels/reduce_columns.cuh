// Sum, mean, product, maximum and minimum over axes that are not the innermost in memory: a thread holds WIDTH neighbouring columns
// and walks over steps, which row threads share. The prologue's rows are (kept row, step), the step running fastest. How threads and
// blocks lie over kept rows, steps and columns is chosen by size (sweeps.py).
#pragma once
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"
#include "scheduler/walk.cuh"

// Joins the values of the row threads of a column: share 0 has the result. `columns`: column threads.
DEVICE void join_shares(Value (&total)[WIDTH], u32 share, u32 shares, u32 columns) {
  __shared__ Value shared[WIDTH][THREADS];
#pragma unroll 1
  for (u32 count = shares; count > 1;) {
    const u32 half = (count + 1) / 2;
    if (share >= half && share < count) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) shared[i][threadIdx.x] = total[i];
    }
    __syncthreads();
    if (share < count - half && threadIdx.x + half * columns < THREADS) {  // not threads that are left over
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) total[i] = Operation::of(total[i], shared[i][threadIdx.x + half * columns]);
    }
    count = half;
  }
}

// The block's threads are kept_threads × row_threads × column_threads, and some that are left over.
template <class PARAMS> DEVICE void run(const PARAMS& p) {
  const u32 lane = threadIdx.x % p.column_threads, group = threadIdx.x / p.column_threads;
  const u32 kept_local = group / p.row_threads, share = group - kept_local * p.row_threads;
  const u32 tile = blockIdx.x / p.splits, split = blockIdx.x - tile * p.splits, row_tile = tile / p.column_tiles;
  const u32 kept = row_tile * p.kept_threads + kept_local, vector = (tile - row_tile * p.column_tiles) * p.column_threads + lane;
  const u32 column = vector * WIDTH;
  const bool inside = kept_local < p.kept_threads && kept < p.kept_rows && vector < p.chunks;
  const u32 count = inside ? min(static_cast<u32>(WIDTH), p.columns - column) : 0;
  const u32 begin = split * p.per_split, end = inside ? min(begin + p.per_split, p.steps) : 0;

  Value total[WIDTH];
  walk(total, begin + share, end, p.row_threads, [&](u32 step, Value (&v)[WIDTH]) {
    Prologue::load(p, kept * p.steps + step, column, count, v);
  });
  join_shares(total, share, p.row_threads, p.column_threads);
  if constexpr (SPLIT) {
    const u32 tile_vectors = p.kept_threads * p.column_threads, own = kept_local * p.column_threads + lane;
    const auto part_of = [&](u32 s) { return p.partial + (static_cast<i64>(tile * p.splits + s) * tile_vectors + own) * WIDTH; };
    if (share == 0 && inside) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) part_of(split)[i] = total[i];
    }
    if (!comes_last(p, tile)) return;
    walk(total, share, inside ? p.splits : 0, p.row_threads, [&](u32 s, Value (&v)[WIDTH]) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) v[i] = part_of(s)[i];
    });
    join_shares(total, share, p.row_threads, p.column_threads);
  }
  if (share == 0 && inside) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) total[i] = finished(p, total[i]);
    Epilogue::store(p, kept, column, count, total);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  run(p);
  stamp_end(p.stamp);
}
