// Bytes of a register in another order.
#pragma once
#include "types.cuh"

// Byte i of the result is the byte of `x` that hexadecimal digit i of `selector` names (0 to 3), or zero (4). Not moved out of a loop
// by the compiler: it costs less than the register that its result would take there.
DEVICE u32 permute_bytes(u32 x, u32 selector) {
  u32 r;
  asm volatile("prmt.b32 %0, %1, 0, %2;" : "=r"(r) : "r"(x), "r"(selector));
  return r;
}
