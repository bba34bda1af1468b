// Expressions over broadcast, strided or gathered inputs, and copies between layouts: a thread computes WIDTH neighbouring
// columns of one row.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

using Count = config::count_t;  // 32 bits wide where that counts all vectors

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 chunks = (p.columns + WIDTH - 1) / WIDTH;
  const Count total = static_cast<Count>(p.rows) * chunks;
  for (Count index = static_cast<Count>(blockIdx.x) * config::threads + threadIdx.x; index < total; index += gridDim.x * config::threads) {
    const u32 row = static_cast<u32>(index / chunks), column = static_cast<u32>(index - static_cast<Count>(row) * chunks) * WIDTH;
    const float none[WIDTH] = {};
    Epilogue::store(p, row, column, min(static_cast<u32>(WIDTH), p.columns - column), none);
  }
  stamp_end(p.stamp);
}
