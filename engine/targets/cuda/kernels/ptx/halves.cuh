// Arithmetic on pairs of halves, two in a register with the first in the low bits, each rounded to nearest.
#pragma once
#include "ptx/convert.cuh"

DEVICE u32 mul_halves(u32 a, u32 b) { u32 r; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 max_halves(u32 a, u32 b) { u32 r; asm("max.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }  // of a NaN and a number the number
// Within 0 and 1; 0 for NaN.
DEVICE u32 mul_halves_to_one(u32 a, u32 b) { u32 r; asm("mul.rn.sat.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
DEVICE u32 tanh_halves(u32 x) { u32 r; asm("tanh.approx.f16x2 %0, %1;" : "=r"(r) : "r"(x)); return r; }  // off by up to 2^-10.987
DEVICE float low_half(u32 x) { return to_float(half{static_cast<u16>(x)}); }
DEVICE float high_half(u32 x) { return to_float(half{static_cast<u16>(x >> 16)}); }
