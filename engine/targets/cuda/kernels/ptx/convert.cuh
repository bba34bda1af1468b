// Conversions between fp32 and the narrower floats, rounded to nearest (16 bits: even).
#pragma once
#include "types.cuh"

DEVICE float to_float(half h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits)); return f; }
DEVICE float to_float(bfloat16 h) { return __int_as_float(static_cast<int>(h.bits) << 16); }
DEVICE half to_half(float f) { half h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f)); return h; }
DEVICE bfloat16 to_bfloat16(float f) { bfloat16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.bits) : "f"(f)); return h; }

// Two halves in one register, the first in the low bits.
DEVICE u32 pack_half2(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

// The bits of the nearest fp32 number with 11 significant bits, ties away from zero.
DEVICE u32 round_to_tf32(float x) {
  u32 r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
