// The moments of rows by parts of 32 columns (scheduler/row_parts.cuh): four lanes have a part, eight columns each, in one load where
// rows are aligned.
#pragma once
#include "epilogue/access.cuh"
#include "ptx/grid.cuh"
#include "scheduler/group_reduce.cuh"
#include "scheduler/row_parts.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int THREADS = config::threads, LANES = PART_COLUMNS / WIDTH, UNROLL = config::unroll;
constexpr u32 ROWS = THREADS / LANES;  // of a block, UNROLL times

extern "C" __global__ void __launch_bounds__(THREADS) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  const u32 part = blockIdx.y, columns = part_columns(part, p.columns), column = WIDTH * (threadIdx.x % LANES);
  const u32 count = column < columns ? min(static_cast<u32>(WIDTH), columns - column) : 0;
  Pack<Element> x[UNROLL];
#pragma unroll
  for (int i = 0; i < UNROLL; ++i) {
    const u32 row = min(blockIdx.x * ROWS * UNROLL + i * ROWS + threadIdx.x / LANES, p.rows - 1);
    const Element* source = p.x + static_cast<i64>(row) * p.stride + part * PART_COLUMNS + column;
    if constexpr (config::aligned) {
      if (count > 0) x[i] = *reinterpret_cast<const Pack<Element>*>(source);
    } else {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j)
        if (j < count) x[i].element[j] = source[j];
    }
  }
#pragma unroll
  for (int i = 0; i < UNROLL; ++i) {
    const u32 row = blockIdx.x * ROWS * UNROLL + i * ROWS + threadIdx.x / LANES;
    RowPart found = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < WIDTH; ++j)
      if (j < count) found.mean += widen(x[i].element[j]);
    found.mean = reduce_group<Sum, LANES>(found.mean) / static_cast<float>(columns);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      const float distance = j < count ? widen(x[i].element[j]) - found.mean : 0.0f;
      found.squares += distance * distance;
    }
    found.squares = reduce_group<Sum, LANES>(found.squares);
    if (threadIdx.x % LANES == 0 && row < p.rows) p.row_parts[static_cast<u64>(part) * p.rows + row] = found;
  }
  stamp_end(p.stamp);
}
