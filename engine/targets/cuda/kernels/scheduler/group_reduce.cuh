// Sums and extremes over the THREADS threads that share a row: shuffles within a warp, shared memory across warps.
#pragma once
#include "ptx/arithmetic.cuh"
#include "types.cuh"

struct Sum { template <class T> DEVICE static T of(T a, T b) { return a + b; } };
struct Product { template <class T> DEVICE static T of(T a, T b) { return a * b; } };
struct Maximum {
  template <class T> DEVICE static T of(T a, T b) { return a > b || a != a ? a : b; }
  DEVICE static float of(float a, float b) { return max_nan(a, b); }
};
struct Minimum {
  template <class T> DEVICE static T of(T a, T b) { return a < b || a != a ? a : b; }
  DEVICE static float of(float a, float b) { return min_nan(a, b); }
};

// Every thread gets the result. THREADS is a power of two, or whole warps; all threads of the block call it where it is more
// than a warp (then a block is one group), and else all threads of a warp.
template <class OPERATION, int THREADS, class T> DEVICE T reduce_group(T v) {
  static_assert(THREADS <= 32 ? 32 % THREADS == 0 : THREADS % 32 == 0, "groups are parts of a warp, or whole warps");
#pragma unroll
  for (int distance = (THREADS < 32 ? THREADS : 32) / 2; distance > 0; distance /= 2)
    v = OPERATION::of(v, static_cast<T>(__shfl_xor_sync(~0u, v, distance)));
  if constexpr (THREADS > 32) {
    __shared__ T partial[THREADS / 32];
    __syncthreads();  // the last reduction's reads are over
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    v = partial[0];
#pragma unroll
    for (int i = 1; i < THREADS / 32; ++i) v = OPERATION::of(v, partial[i]);
  }
  return v;
}
