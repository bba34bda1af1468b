// Arithmetic on pairs of halves, two in a register with the first in the low bits, each rounded to nearest.
#pragma once
#include "ptx/convert.cuh"

DEVICE u32 mul_halves(u32 a, u32 b) { u32 r; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 fma_halves(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
DEVICE u32 abs_halves(u32 x) { u32 r; asm("abs.f16x2 %0, %1;" : "=r"(r) : "r"(x)); return r; }
DEVICE u32 neg_halves(u32 x) { u32 r; asm("neg.f16x2 %0, %1;" : "=r"(r) : "r"(x)); return r; }
// Of a NaN and a number the number, and NaN.
DEVICE u32 min_halves(u32 a, u32 b) { u32 r; asm("min.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 max_nan_halves(u32 a, u32 b) { u32 r; asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
DEVICE u32 exp2_halves(u32 x) { u32 r; asm("ex2.approx.f16x2 %0, %1;" : "=r"(r) : "r"(x)); return r; }  // relative error up to 2^-9.9
DEVICE float low_half(u32 x) { return to_float(half{static_cast<u16>(x)}); }
DEVICE float high_half(u32 x) { return to_float(half{static_cast<u16>(x >> 16)}); }
