// What follows attention_decode.cuh where several blocks share queries: the parts of a row are joined, always in the same order, so a
// result has the same bits in every run. A warp has a row; its lanes eight columns each, and of what lanes are left every so many take
// some of the parts.
// Parameters: `splits`; `partials`, of every tile and part `rows` × VALUE sums; `states`, of every row of these its maximum (in units of
// log2) and the sum of its exponentials, in 16 bytes. Rows of the epilogue are `rows` of each tile.
#pragma once
#include "ptx/arithmetic.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "scheduler/stamp.cuh"

constexpr int VALUE = config::value_padded, PIECES = VALUE / 8;
constexpr int LANES = PIECES <= 4 ? 4 : PIECES <= 8 ? 8 : PIECES <= 16 ? 16 : 32, GROUPS = 32 / LANES;
constexpr int BATCH = 8;  // loads of 32 bytes of a lane under way at once
constexpr int SEVERAL = 2;  // states of a lane
static_assert(config::most_splits <= 32 * SEVERAL, "the lanes of a warp hold the states of a row");

extern "C" __global__ void __launch_bounds__(32 * config::warps) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  const u32 lane = threadIdx.x & 31, row = blockIdx.x * config::warps + threadIdx.x / 32;
  if (row < p.all_rows) {
    const u32 tile = row / p.rows, group = lane / LANES, column = 8 * (lane % LANES);
    const u64 first = static_cast<u64>(tile) * p.splits * p.rows + (row - tile * p.rows);  // among the rows of all parts
    float weights[SEVERAL], sums[SEVERAL], highest = -INFINITY, total = 0.0f;  // weights: maxima, to begin with
#pragma unroll
    for (int i = 0; i < SEVERAL; ++i) {
      const u32 s = 32 * i + lane;
      const float4 state = load_global_16(p.states + 4 * (first + static_cast<u64>(min(s, p.splits - 1)) * p.rows));
      weights[i] = s < p.splits ? state.x : -INFINITY;
      sums[i] = s < p.splits ? state.y : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < SEVERAL; ++i) highest = fmaxf(highest, weights[i]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, distance));
    if (highest == -INFINITY) highest = 0.0f;  // no key is left of any part: every weight is then 0, not NaN
#pragma unroll
    for (int i = 0; i < SEVERAL; ++i) {
      weights[i] = exp2_approx(weights[i] - highest);
      total = fmaf(weights[i], sums[i], total);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
    float v[8] = {};
#pragma unroll 1
    for (u32 begin = 0; begin < p.splits; begin += BATCH * GROUPS) {
      float4 low[BATCH], high[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const u32 s = min(begin + b * GROUPS + group, p.splits - 1);
        const float* const part = p.partials + (first + static_cast<u64>(s) * p.rows) * VALUE + min(column, VALUE - 8u);
        low[b] = load_global_16(part);
        high[b] = load_global_16(part + 4);
      }
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const u32 s = begin + b * GROUPS + group;
        const float early = __shfl_sync(~0u, weights[0], s & 31), late = __shfl_sync(~0u, weights[1], s & 31);
        const float weight = s < 32 ? early : late;
        const float of_part[8] = {low[b].x, low[b].y, low[b].z, low[b].w, high[b].x, high[b].y, high[b].z, high[b].w};
#pragma unroll
        for (int j = 0; j < 8; ++j)
          if (s < p.splits) v[j] = fmaf(weight, of_part[j], v[j]);
      }
    }
    // With every key masked 0 / 0 gives the NaN that the softmax gives, unless the operator asks for zeros.
    const float scale = config::masked_rows_zero && total == 0.0f ? 0.0f : 1.0f / total;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int distance = LANES; distance < 32; distance *= 2) v[j] += __shfl_xor_sync(~0u, v[j], distance);
      v[j] *= scale;
    }
    if (group == 0 && column < p.value_size) Epilogue::store(p, row, column, min(8u, p.value_size - column), v);
  }
  stamp_end(p.stamp);
}
