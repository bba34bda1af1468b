// Blocks that share queries, each with a part of the keys: the warp that comes last puts together what all of them have, always in the
// same order, so a result has the same bits in every run (as scheduler/split_k.cuh does for products). Included by attention_mma.cuh.
#pragma once
#include "ptx/arithmetic.cuh"
#include "scheduler/split_k.cuh"

// out, maximum, sum: this warp's state after its part of the keys. `share` numbers the warps' queries in all tiles. True for the warp
// that comes last, whose state is then that of all keys. All lanes of the warp call it.
// Parameters: `splits`; `partials`, shares × splits × FRAGMENTS × (N + 4) × 32 floats; `arrived`, a counter for each share, zero before
// the first run.
template <bool SPLIT, class P, int FRAGMENTS, int N>
DEVICE bool combine_splits(const P& p, float (&out)[FRAGMENTS][N], float (&maximum)[FRAGMENTS][2], float (&sum)[FRAGMENTS][2], u32 share, u32 split) {
  if constexpr (!SPLIT) {
    return true;
  } else {
    static_assert(N % 4 == 0, "");
    constexpr u32 PER_FRAGMENT = (N + 4) * 32, PER_SPLIT = FRAGMENTS * PER_FRAGMENT;  // floats of a warp
    const u32 lane = threadIdx.x & 31;
    float* const first = p.partials + static_cast<u64>(share) * p.splits * PER_SPLIT + 4 * lane;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      float* const to = first + split * PER_SPLIT + f * PER_FRAGMENT;
      store_global_16(to, make_float4(maximum[f][0], maximum[f][1], sum[f][0], sum[f][1]));
#pragma unroll
      for (int i = 0; i < N; i += 4) store_global_16(to + (i + 4) * 32, make_float4(out[f][i], out[f][i + 1], out[f][i + 2], out[f][i + 3]));
    }
    __threadfence();  // what this lane wrote is visible before the warp is counted
    __syncwarp();
    u32 before = 0;
    if (lane == 0) before = atomicAdd(p.arrived + share, 1u);
    if (__shfl_sync(~0u, before, 0) != p.splits - 1) return false;
    __threadfence();  // the others were counted before what they wrote is read
    if (lane == 0) p.arrived[share] = 0;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
      const float* const from = first + f * PER_FRAGMENT;
      float shift[2] = {-INFINITY, -INFINITY};
      for (u32 s = 0; s < p.splits; ++s) {
        const float4 v = load_global_16(from + s * PER_SPLIT);
        shift[0] = fmaxf(shift[0], v.x);
        shift[1] = fmaxf(shift[1], v.y);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (shift[h] == -INFINITY) shift[h] = 0.0f;  // no key is left of any part: every weight is then 0, not NaN
        sum[f][h] = 0.0f;
      }
#pragma unroll
      for (int i = 0; i < N; ++i) out[f][i] = 0.0f;
      for (u32 s = 0; s < p.splits; ++s) {
        const float4 state = load_global_16(from + s * PER_SPLIT);
        const float weight[2] = {exp2_approx(state.x - shift[0]), exp2_approx(state.y - shift[1])};
        sum[f][0] = fmaf(weight[0], state.z, sum[f][0]);
        sum[f][1] = fmaf(weight[1], state.w, sum[f][1]);
#pragma unroll
        for (int i = 0; i < N; i += 4) {
          const float4 v = load_global_16(from + s * PER_SPLIT + (i + 4) * 32);
          out[f][i] = fmaf(weight[0], v.x, out[f][i]);
          out[f][i + 1] = fmaf(weight[0], v.y, out[f][i + 1]);
          out[f][i + 2] = fmaf(weight[1], v.z, out[f][i + 2]);
          out[f][i + 3] = fmaf(weight[1], v.w, out[f][i + 3]);
        }
      }
    }
    return true;
  }
}
