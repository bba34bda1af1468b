// Global memory that will be read soon is brought to the L2 cache, without a register to wait for.
#pragma once
#include "types.cuh"

DEVICE void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
// So many bytes at once, a multiple of 16 from a multiple of 16 on; nothing before sm_90, whose copy engine does it.
DEVICE void prefetch_l2_bytes(const void* address, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes) : "memory");
#endif
}
