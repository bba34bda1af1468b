// Emulates kernels/ptx/halves.cuh.
#pragma once
#include "ptx/convert.cuh"
inline float low_half(u32 x) { return to_float(half{static_cast<u16>(x)}); }
inline float high_half(u32 x) { return to_float(half{static_cast<u16>(x >> 16)}); }
template <class F> u32 each_half(u32 a, u32 b, u32 c, F f) {
  return pack_half2(f(low_half(a), low_half(b), low_half(c)), f(high_half(a), high_half(b), high_half(c)));
}
// Products of halves are exact in fp32, and sums of them with a half in fp64.
inline u32 mul_halves(u32 a, u32 b) { return each_half(a, b, 0, [](float a, float b, float) { return a * b; }); }
inline u32 fma_halves(u32 a, u32 b, u32 c) { return each_half(a, b, c, [](float a, float b, float c) { return static_cast<float>(static_cast<double>(a) * b + c); }); }
inline u32 abs_halves(u32 x) { return x & 0x7fff7fff; }
inline u32 neg_halves(u32 x) { return x ^ 0x80008000; }
inline u32 min_halves(u32 a, u32 b) { return each_half(a, b, 0, [](float a, float b, float) { return fminf(a, b); }); }
inline u32 max_nan_halves(u32 a, u32 b) { return each_half(a, b, 0, [](float a, float b, float) { return a > b || a != a ? a : b; }); }
inline u32 exp2_halves(u32 x) { return each_half(x, 0, 0, [](float x, float, float) { return exp2f(x); }); }
