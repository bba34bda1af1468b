// Sum, mean, product, maximum and minimum over the innermost axis in memory and any others: a group of threads (part of a warp, a
// warp, or the block) has a result. The prologue's rows are (kept row, step), the step running fastest.
#pragma once
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"
#include "scheduler/walk.cuh"

constexpr int GROUP = config::group;
static_assert(!SPLIT || GROUP == THREADS, "only the walk of a whole block is split");

template <class PARAMS> DEVICE void run(const PARAMS& p) {
  const u32 tile = blockIdx.x / p.splits, split = blockIdx.x - tile * p.splits;
  const u32 kept = tile * (THREADS / GROUP) + threadIdx.x / GROUP;
  const u32 begin = split * p.per_split, end = kept < p.kept_rows ? min(begin + p.per_split, p.steps * p.chunks) : 0;
  Value total[WIDTH];
  walk(total, begin + threadIdx.x % GROUP, end, GROUP, [&](u32 index, Value (&v)[WIDTH]) {
    const u32 step = config::stepped ? index / p.chunks : 0, column = (index - step * p.chunks) * WIDTH;
    const u32 count = min(static_cast<u32>(WIDTH), p.columns - column);
    Prologue::load(p, kept * p.steps + step, column, count, v);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      if (i >= count) v[i] = identity();
  });
#pragma unroll
  for (int distance = WIDTH / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int i = 0; i < distance; ++i) total[i] = Operation::of(total[i], total[i + distance]);
  Value result = reduce_group<Operation, GROUP>(total[0]);
  if constexpr (SPLIT) {
    Value* const parts = p.partial + static_cast<i64>(tile) * p.splits;
    if (threadIdx.x == 0) parts[split] = result;
    if (!comes_last(p, tile)) return;
    result = identity();
    for (u32 s = threadIdx.x; s < p.splits; s += THREADS) result = Operation::of(result, parts[s]);
    result = reduce_group<Operation, GROUP>(result);
  }
  if (threadIdx.x % GROUP == 0 && kept < p.kept_rows) {
    Value every[WIDTH] = {finished(p, result)};
    Epilogue::store(p, kept, 0, 1, every);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  run(p);
  stamp_end(p.stamp);
}
