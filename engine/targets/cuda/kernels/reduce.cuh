// Sum, mean, product, maximum and minimum over any axes. The prologue's rows are (kept row, step), the step running fastest.
// Columns are either kept (a thread holds WIDTH of them; row threads share the steps) or reduced as well (a group of threads has
// a result: part of a warp, a warp, or the block). Where few results leave the GPU empty, a walk is split over blocks: one launch
// leaves the results of the parts, the next reduces those. `identity` comes from reduce.py.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/group_reduce.cuh"
#include "scheduler/stamp.cuh"

using Operation = config::operation;
using Value = Prologue::value_t;
constexpr int COLUMN_THREADS = config::column_threads, ROW_THREADS = config::row_threads;
constexpr int THREADS = COLUMN_THREADS * ROW_THREADS * config::kept_threads;
constexpr u32 CHAIN = 64;  // additions one after the other: a sum of n terms is off by a few times CHAIN + n / CHAIN roundings

DEVICE void reset(Value (&v)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) v[i] = identity();
}
DEVICE void combine(Value (&a)[WIDTH], const Value (&b)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) a[i] = Operation::of(a[i], b[i]);
}

// What is left to do when all parts are together. Narrow integers were reduced in 32 bits and wrap now.
DEVICE Value finished(const Params& p, Value x) {
  if constexpr (!config::last) return x;
  if constexpr (config::mean) {
    if constexpr (same<Value, float>::value || same<Value, double>::value) x /= static_cast<Value>(p.count);
    else x = p.count == 0 ? Value(0) : x / static_cast<Value>(p.count);
  }
  return static_cast<Value>(static_cast<config::element_t>(x));
}

// Reduces indices begin + first, + stride, … of what `load` gives, in chains.
template <class LOAD> DEVICE void walk(Value (&total)[WIDTH], u32 begin, u32 end, u32 first, u32 stride, LOAD&& load) {
  reset(total);
  for (u32 chain = begin; chain < end; chain += CHAIN * stride) {
    const u32 stop = min(chain + CHAIN * stride, end);
    Value part[WIDTH];
    reset(part);
#pragma unroll 4
    for (u32 i = chain + first; i < stop; i += stride) load(i, part);
    combine(total, part);
  }
}

DEVICE void reduce_columns(const Params& p) {
  const u32 lane = threadIdx.x % COLUMN_THREADS, share = threadIdx.x / COLUMN_THREADS % ROW_THREADS;
  const u32 tile = blockIdx.x / p.splits, split = blockIdx.x - tile * p.splits, row_tile = tile / p.column_tiles;
  const u32 kept = row_tile * config::kept_threads + threadIdx.x / (COLUMN_THREADS * ROW_THREADS);
  const u32 column = ((tile - row_tile * p.column_tiles) * COLUMN_THREADS + lane) * WIDTH;
  const u32 count = kept < p.kept_rows && column < p.columns ? min(static_cast<u32>(WIDTH), p.columns - column) : 0;
  const u32 begin = split * p.per_split, end = count > 0 ? min(begin + p.per_split, p.steps) : 0;

  Value total[WIDTH];
  walk(total, begin, end, share, ROW_THREADS, [&](u32 step, Value (&part)[WIDTH]) {
    Value v[WIDTH];
    Prologue::load(p, kept * p.steps + step, column, count, v);
    combine(part, v);
  });
  if constexpr (ROW_THREADS > 1) {
    __shared__ Value shared[WIDTH][THREADS];
#pragma unroll 1
    for (u32 half = ROW_THREADS / 2; half > 0; half /= 2) {
      if (share >= half && share < 2 * half) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) shared[i][threadIdx.x] = total[i];
      }
      __syncthreads();
      if (share < half) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) total[i] = Operation::of(total[i], shared[i][threadIdx.x + half * COLUMN_THREADS]);
      }
    }
  }
  if (share == 0 && count > 0) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) total[i] = finished(p, total[i]);
    Epilogue::store(p, kept * p.splits + split, column, count, total);
  }
}

// A group's threads are the column threads of the block.
DEVICE void reduce_rows(const Params& p) {
  constexpr int GROUP = COLUMN_THREADS;
  const u32 tile = blockIdx.x / p.splits, split = blockIdx.x - tile * p.splits;
  const u32 kept = tile * config::kept_threads + threadIdx.x / GROUP;
  const u32 begin = split * p.per_split, end = kept < p.kept_rows ? min(begin + p.per_split, p.steps * p.chunks) : 0;
  Value total[WIDTH];
  walk(total, begin, end, threadIdx.x % GROUP, GROUP, [&](u32 index, Value (&part)[WIDTH]) {
    const u32 step = index / p.chunks, column = (index - step * p.chunks) * WIDTH;
    const u32 count = min(static_cast<u32>(WIDTH), p.columns - column);
    Value v[WIDTH];
    Prologue::load(p, kept * p.steps + step, column, count, v);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      if (i < count) part[i] = Operation::of(part[i], v[i]);
  });
#pragma unroll
  for (int distance = WIDTH / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int i = 0; i < distance; ++i) total[i] = Operation::of(total[i], total[i + distance]);
  const Value sum = reduce_group<Operation, GROUP>(total[0]);
  if (threadIdx.x % GROUP == 0 && kept < p.kept_rows) {
    Value result[WIDTH] = {finished(p, sum)};
    Epilogue::store(p, kept * p.splits + split, 0, 1, result);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  if constexpr (config::columns_kept) reduce_columns(p);
  else reduce_rows(p);
  stamp_end(p.stamp);
}
