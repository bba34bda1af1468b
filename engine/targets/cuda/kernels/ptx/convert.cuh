// Conversions between fp32 and the narrower floats, rounded to nearest (tf32: ties away from zero, others to even).
#pragma once
#include "types.cuh"
#include "float8.cuh"

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

// e4m3: what is beyond its largest number, 448, becomes it. Pairs have the first number in the low bits.
#if __CUDA_ARCH__ >= 890
DEVICE u16 pack_e4m3x2(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE u32 halves_of_e4m3x2(u16 pair) {
  u32 r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(pair));
  return r;
}
DEVICE float to_float(e4m3 x) { return to_float(half{static_cast<u16>(halves_of_e4m3x2(x.bits))}); }
DEVICE e4m3 to_e4m3(float f) { return {static_cast<u8>(pack_e4m3x2(f, 0.0f))}; }
#else
DEVICE float to_float(e4m3 x) { return float_of_e4m3(x); }
DEVICE e4m3 to_e4m3(float f) { return e4m3_of_float(f); }
DEVICE u16 pack_e4m3x2(float low, float high) { return static_cast<u16>(to_e4m3(low).bits | to_e4m3(high).bits << 8); }
DEVICE u32 halves_of_e4m3x2(u16 pair) {
  const u32 spread = __byte_perm(pair, 0, 0x1404), magnitude = spread & 0x7f007f00, nan = (magnitude + 0x01000100) & 0x80008000;
  // Exponent and mantissa shifted into place, which is a number 2^8 too small.
  u32 r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"((spread & 0x80008000) | magnitude >> 1), "r"(0x5c005c00));
  return r | (nan - (nan >> 15));
}
#endif

// Two integers of 8 bits as halves, the first in the low bits: 1024 + 128 + x is a half whose last bits are x, but for the sign's.
DEVICE u32 halves_of_i8x2(u16 pair) {
  u32 r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(__byte_perm(pair ^ 0x8080, 0x64, 0x4140)), "r"(0x64806480));
  return r;
}

// The bits of the nearest fp32 number with 11 significant bits, ties away from zero.
DEVICE u32 round_to_tf32(float x) {
  u32 r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
