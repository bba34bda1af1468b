// The warpgroup matrix instruction of sm_90a: bookkeeping and operand descriptors. The product itself, `wgmma<N, T>`, is generated
// per tile width (gemm_wgmma.py), because its accumulators are N / 2 separate operands.
#pragma once
#include "types.cuh"

// An operand in shared memory: rows of ROW_BYTES (under the swizzle of as many), eight rows to an atom. Adding 2 to the result moves
// 32 bytes along k, within a row; adding 4 · ROW_BYTES moves 64 rows.
template <int ROW_BYTES> DEVICE u64 operand_descriptor(u32 address) {
  static_assert(ROW_BYTES == 128 || ROW_BYTES == 64 || ROW_BYTES == 32, "");
  constexpr u64 SWIZZLE = (ROW_BYTES == 128 ? 1ull : ROW_BYTES == 64 ? 2ull : 3ull) << 62, STRIDE = 8 * ROW_BYTES >> 4;
  constexpr u64 LEADING = 1;  // ignored under a swizzle
  return SWIZZLE | STRIDE << 32 | LEADING << 16 | (address & 0x3FFFF) >> 4;
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// Ties accumulators to this place: the compiler must not read them earlier, while the product is still running.
template <int N> DEVICE void wgmma_settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> DEVICE void wgmma_settle(i32 (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
