// Layer, RMS and L2 norm, softmax and its logarithm: what needs a whole row twice. A row stays in the registers of its group of
// threads (a warp, or the block): read once through the prologue, reduced exactly (the variance around the mean), written once
// through the epilogue. Statistics in fp32.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/group_reduce.cuh"
#include "scheduler/stamp.cuh"

enum class Kind {  // in the order of _KINDS of normalize.py
  LAYER, RMS, L2, SOFTMAX, LOG_SOFTMAX
};
constexpr Kind KIND = static_cast<Kind>(config::kind);
constexpr int GROUP = config::threads_per_row, CHUNKS = config::chunks, ROWS = config::threads / GROUP;
static_assert(GROUP == 32 || ROWS == 1, "a row belongs to a warp or to the block");

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 row = blockIdx.x * ROWS + threadIdx.x / GROUP, lane = threadIdx.x % GROUP;
  if (row < p.rows) {  // the same for all threads of a group
    float v[CHUNKS][WIDTH];
    const auto each = [&](auto&& visit) {
#pragma unroll
      for (int i = 0; i < CHUNKS; ++i) {
        const u32 column = (i * GROUP + lane) * WIDTH;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j)
          if (column + j < p.columns) visit(v[i][j]);
      }
    };
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const u32 column = (i * GROUP + lane) * WIDTH;
      if (column < p.columns) Prologue::load(p, row, column, min(static_cast<u32>(WIDTH), p.columns - column), v[i]);
    }

    if constexpr (KIND == Kind::SOFTMAX || KIND == Kind::LOG_SOFTMAX) {
      float maximum = -INFINITY, sum = 0.0f;
      each([&](float& x) { maximum = fmaxf(maximum, x); });
      maximum = reduce_group<Maximum, GROUP>(maximum);
      each([&](float& x) { x -= maximum; sum += exp2_approx(x * 1.44269504f); });
      sum = reduce_group<Sum, GROUP>(sum);
      const float scale = KIND == Kind::SOFTMAX ? 1.0f / sum : logf(sum);
      if constexpr (KIND == Kind::SOFTMAX) each([&](float& x) { x = exp2_approx(x * 1.44269504f) * scale; });
      else each([&](float& x) { x -= scale; });
    } else {
      float mean = 0.0f, squares = 0.0f;
      if constexpr (KIND == Kind::LAYER) {
        each([&](float& x) { mean += x; });
        mean = reduce_group<Sum, GROUP>(mean) / static_cast<float>(p.columns);
      }
      each([&](float& x) { x -= mean; squares = fmaf(x, x, squares); });
      squares = reduce_group<Sum, GROUP>(squares);
      const float scale = KIND == Kind::L2 ? 1.0f / fmaxf(sqrtf(squares), p.epsilon)
                                           : rsqrtf(squares / static_cast<float>(p.columns) + p.epsilon);
      each([&](float& x) { x *= scale; });
    }

#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const u32 column = (i * GROUP + lane) * WIDTH;
      if (column < p.columns) Epilogue::store(p, row, column, min(static_cast<u32>(WIDTH), p.columns - column), v[i]);
    }
  }
  stamp_end(p.stamp);
}
