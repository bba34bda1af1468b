// Sum, mean, product, maximum and minimum over any axes. The prologue's rows are (kept row, reduced row), the reduced one
// running fastest; columns are either kept (a thread holds WIDTH of them, the block's second axis shares the reduced rows) or
// reduced as well (one block per result). `identity` comes from reduce.py.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/group_reduce.cuh"
#include "scheduler/stamp.cuh"

using Operation = config::operation;
using Value = Prologue::value_t;
constexpr int COLUMN_THREADS = config::column_threads, ROW_THREADS = config::row_threads, THREADS = COLUMN_THREADS * ROW_THREADS;

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 kept = blockIdx.y + blockIdx.z * gridDim.y;
  if constexpr (config::columns_kept) {
    __shared__ Value partial[ROW_THREADS][COLUMN_THREADS][WIDTH];
    const u32 lane = threadIdx.x % COLUMN_THREADS, share = threadIdx.x / COLUMN_THREADS;
    const u32 column = (blockIdx.x * COLUMN_THREADS + lane) * WIDTH, count = column < p.columns ? min(static_cast<u32>(WIDTH), p.columns - column) : 0;
    Value sum[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum[i] = identity();
    if (kept < p.kept_rows && count > 0) {
#pragma unroll 4
      for (u32 r = share; r < p.reduced_rows; r += ROW_THREADS) {
        Value v[WIDTH];
        Prologue::load(p, kept * p.reduced_rows + r, column, count, v);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sum[i] = Operation::of(sum[i], v[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) partial[share][lane][i] = sum[i];
    __syncthreads();
    if (share == 0 && kept < p.kept_rows && count > 0) {
#pragma unroll
      for (int r = 1; r < ROW_THREADS; ++r)
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sum[i] = Operation::of(sum[i], partial[r][lane][i]);
      if constexpr (config::mean) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sum[i] = static_cast<Value>(sum[i] / static_cast<Value>(p.reduced_rows));
      }
      Epilogue::store(p, kept, column, count, sum);
    }
  } else if (kept < p.kept_rows) {
    const u32 chunks = (p.columns + WIDTH - 1) / WIDTH;
    Value sum = identity();
    for (u32 r = 0; r < p.reduced_rows; ++r)
      for (u32 chunk = threadIdx.x; chunk < chunks; chunk += THREADS) {
        const u32 column = chunk * WIDTH, count = min(static_cast<u32>(WIDTH), p.columns - column);
        Value v[WIDTH];
        Prologue::load(p, kept * p.reduced_rows + r, column, count, v);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
          if (i < count) sum = Operation::of(sum, v[i]);
      }
    sum = reduce_group<Operation, THREADS>(sum);
    if (threadIdx.x == 0) {
      if constexpr (config::mean) sum = static_cast<Value>(sum / static_cast<Value>(static_cast<u64>(p.reduced_rows) * p.columns));
      Value result[WIDTH] = {sum};
      Epilogue::store(p, kept, 0, 1, result);
    }
  }
  stamp_end(p.stamp);
}
