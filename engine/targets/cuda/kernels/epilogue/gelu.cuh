// GELU for results of 16 bits, two columns in a register of halves.
#pragma once
#include "epilogue/math.cuh"
#include "ptx/halves.cuh"
#include "ptx/pack.cuh"

// x Φ(x) = max(x, 0) − t Φ(−t) with t = |x|, and log2 Φ(−t) close to a parabola: a polynomial and an exponential. TERMS of it, the least
// power first, each twice in its word; beyond t = 6 nothing is left of Φ(−t). Returns the results as T, which `x` becomes, too.
// Beside rounding x to a half it is off by up to 2^-11, and by up to 2^-6 of t Φ(−t) and six steps of 2^-24 (gelu.py).
template <class T, u32... TERMS> DEVICE u32 gelu_of_two(float (&x)[2]) {
  constexpr u32 SIX = 0x46004600, C[] = {TERMS...};
  constexpr int COUNT = sizeof...(TERMS);
  const u32 own = pack_half2(x[0], x[1]), t = min_halves(abs_halves(own), SIX);
  u32 power = C[COUNT - 1];
#pragma unroll
  for (int i = COUNT - 2; i >= 0; --i) power = fma_halves(t, power, C[i]);
  const u32 below = exp2_halves(power);
  if constexpr (same<T, half>::value) {
    const u32 word = fma_halves(neg_halves(t), below, max_nan_halves(own, 0));
    x[0] = low_half(word);
    x[1] = high_half(word);
    return word;
  } else {  // which goes beyond the halves' range
    static_assert(same<T, bfloat16>::value, "");
    const u32 less = mul_halves(t, below);
    x[0] = max_nan(x[0], 0.0f) - low_half(less);
    x[1] = max_nan(x[1], 0.0f) - high_half(less);
    return pack_pair<T>(x[0], x[1]);
  }
}
