// Expressions over broadcast, strided or gathered inputs, and copies between layouts: a thread computes WIDTH neighbouring
// columns of one row. Where rows are looked up it waits for two loads one after the other: then it has two vectors under way.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

using Count = config::count_t;  // 32 bits wide where that counts all vectors
constexpr int AHEAD = config::ahead;  // vectors of a thread whose loads are under way at once

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 chunks = (p.columns + WIDTH - 1) / WIDTH;
  const Count total = static_cast<Count>(p.rows) * chunks, stride = static_cast<Count>(gridDim.x) * config::threads;
  for (Count first = static_cast<Count>(blockIdx.x) * config::threads + threadIdx.x; first < total; first += AHEAD * stride) {
    typename Epilogue::Inputs inputs[AHEAD];
    u32 rows[AHEAD], columns[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {  // beyond the end the first once more, so that no load is branched around
      const Count index = first + i * stride < total ? first + i * stride : first;
      rows[i] = static_cast<u32>(index / chunks);
      columns[i] = static_cast<u32>(index - static_cast<Count>(rows[i]) * chunks) * WIDTH;
      inputs[i] = Epilogue::fetch(p, rows[i], columns[i], min(static_cast<u32>(WIDTH), p.columns - columns[i]));
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (i > 0 && first + i * stride >= total) break;
      const float none[WIDTH] = {};
      Epilogue::store(p, rows[i], columns[i], min(static_cast<u32>(WIDTH), p.columns - columns[i]), none, inputs[i]);
    }
  }
  stamp_end(p.stamp);
}
