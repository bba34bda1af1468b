// Blocks that share a tile of a product, each with a part of k: the warp that comes last adds up what all of them have.
// Always in the same order, so a result has the same bits in every run; without a pass of its own, and without clearing anything
// between runs, because the last warp resets the counter that it found full.
#pragma once
#include "ptx/memory.cuh"

// Sums of integers travel as the bits of floats.
DEVICE float as_stored(float x) { return x; }
DEVICE float as_stored(i32 x) { return __int_as_float(x); }
DEVICE void add_stored(float& d, float x) { d += x; }
DEVICE void add_stored(i32& d, float x) { d += __float_as_int(x); }

template <class T, int ROWS, int N>
DEVICE bool add_partial_sums(T (&d)[ROWS][N], float* partials, u32* arrived, u32 fragment, u32 split, u32 splits) {
  static_assert(N % 4 == 0, "");
  constexpr u32 SHARE = ROWS * N * 32;  // floats a warp
  const u32 lane = threadIdx.x & 31;
  float* const first = partials + static_cast<u64>(fragment) * splits * SHARE + 4 * lane;
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < N; j += 4)
      store_global_16(first + split * SHARE + (i * N + j) * 32, make_float4(as_stored(d[i][j]), as_stored(d[i][j + 1]), as_stored(d[i][j + 2]), as_stored(d[i][j + 3])));
  __syncwarp();
  u32 before = 0;
  if (lane == 0) {
    fence_gpu();  // what the warp wrote is visible before it is counted
    before = atomicAdd(arrived + fragment, 1u);
    fence_gpu();  // the others were counted before what they wrote is read
  }
  before = __shfl_sync(~0u, before, 0);
  __syncwarp();
  if (before != splits - 1) return false;
  if (lane == 0) arrived[fragment] = 0;
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j) d[i][j] = 0;
  constexpr int TOGETHER = ROWS * N < 32 ? 32 / (ROWS * N) : 1;  // parts whose loads fill the registers
#pragma unroll TOGETHER
  for (u32 s = 0; s < splits; ++s)
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < N; j += 4) {
        const float4 v = load_global_16(first + s * SHARE + (i * N + j) * 32);
        add_stored(d[i][j], v.x);
        add_stored(d[i][j + 1], v.y);
        add_stored(d[i][j + 2], v.z);
        add_stored(d[i][j + 3], v.w);
      }
  return true;
}

// The parameters of a kernel that splits: `splits`; `partials`, fragments × splits × ROWS × N × 32 floats; and `arrived`, a counter for
// each fragment, zero before the first run. Where nothing is split a kernel has none of them.
template <bool SPLIT, class P> DEVICE u32 splits_of(const P& p) {
  if constexpr (SPLIT) return p.splits;
  else return 1;
}

// d: this warp's accumulators for part `split`. `fragment` numbers the warps' shares of all tiles. True for the warp that comes last,
// whose d is then the whole sum. All lanes of the warp call it.
template <bool SPLIT, class P, class T, int ROWS, int N> DEVICE bool add_splits(const P& p, T (&d)[ROWS][N], u32 fragment, u32 split) {
  if constexpr (SPLIT) return add_partial_sums(d, p.partials, p.arrived, fragment, split, p.splits);
  else return true;
}
