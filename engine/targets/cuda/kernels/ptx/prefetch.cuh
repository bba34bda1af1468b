// Global memory that will be read soon is brought to a cache.
#pragma once
#include "types.cuh"

// To the L2 cache, without a register to wait for.
DEVICE void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// To the L1 cache the 32 bytes around a byte, until which it waits: were the byte more than a byte can be it would be stored again, so that the
// load is not left out.
DEVICE void touch(const void* address) {
  asm volatile("{.reg .u32 byte; .reg .pred never; ld.global.u8 byte, [%0]; setp.gt.u32 never, byte, 255; @never st.global.u8 [%0], byte;}"
               ::"l"(address) : "memory");
}
