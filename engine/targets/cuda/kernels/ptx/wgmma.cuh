// The warpgroup matrix instruction of sm_90a: bookkeeping and operand descriptors. The product itself, `wgmma<N, T>`, is generated
// per tile width (gemm.py), because its accumulators are N / 2 separate operands.
#pragma once
#include "types.cuh"

// An operand in shared memory: rows of 128 bytes (64 halves or 32 words, 128-byte swizzle), eight rows to an atom of 1024 bytes.
// Adding 2 to the result moves 32 bytes along k, adding 512 moves 64 rows.
DEVICE u64 operand_descriptor(u32 address) {
  constexpr u64 SWIZZLE_128 = 1ull << 62, STRIDE = 1024 >> 4, LEADING = 1;  // LEADING is ignored under this swizzle
  return SWIZZLE_128 | STRIDE << 32 | LEADING << 16 | (address & 0x3FFFF) >> 4;
}
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// Ties accumulators to this place: the compiler must not read them earlier, while the product is still running.
template <int N> DEVICE void wgmma_settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
