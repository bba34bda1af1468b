// Global memory that will be read soon is brought to the L2 cache, without a register to wait for.
#pragma once
#include "types.cuh"

DEVICE void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }
