// What a layer norm multiplies rows by, 1 / √(variance + ε), and with `offsets` what it then subtracts: a warp has a row, and lanes eight
// columns at once of it, in one load where rows are aligned. Each row is read once: its squares are added up around its first element,
// which is about as far from its mean as the others are.
#pragma once
#include "epilogue/access.cuh"
#include "ptx/grid.cuh"
#include "scheduler/group_reduce.cuh"
#include "scheduler/row_moments.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int THREADS = config::threads, UNROLL = 4;

extern "C" __global__ void __launch_bounds__(THREADS) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  const u32 lane = threadIdx.x % 32, row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (row < p.rows) {
    const Element* const x = p.x + static_cast<u64>(row) * p.columns;
    const float pivot = widen(x[0]);
    RowSums sums = {0.0f, 0.0f};
    for (u32 begin = WIDTH * lane; begin < p.columns; begin += 32 * WIDTH * UNROLL) {
      Pack<Element> pack[UNROLL];
#pragma unroll
      for (int i = 0; i < UNROLL; ++i) {
        const u32 column = begin + 32 * WIDTH * i;
        if constexpr (config::aligned) {
          if (column < p.columns) pack[i] = *reinterpret_cast<const Pack<Element>*>(x + column);
        } else {
#pragma unroll
          for (int j = 0; j < WIDTH; ++j)
            if (column + j < p.columns) pack[i].element[j] = x[column + j];
        }
      }
#pragma unroll
      for (int i = 0; i < UNROLL; ++i)
#pragma unroll
        for (int j = 0; j < WIDTH; ++j)
          if (begin + 32 * WIDTH * i + j < p.columns) add(sums, widen(pack[i].element[j]) - pivot);
    }
    sums = {reduce_group<Sum, 32>(sums.sum), reduce_group<Sum, 32>(sums.squares)};
    store_factors_if<config::offsets>(lane == 0, p, row, sums, 1.0f / static_cast<float>(p.columns), pivot);
  }
  stamp_end(p.stamp);
}
