// Activations for results of 16 bits, two columns in a register of halves.
#pragma once
#include "epilogue/math.cuh"
#include "ptx/halves.cuh"
#include "ptx/pack.cuh"

// x · (½ + ½ tanh(x · P)): SiLU and its like with P a constant, GELU by tanh with P of x² in two terms, GELU itself with P of
// min(x² / 64, 1) in three. TERMS: the least power first, each twice in its word. Returns the results as T, which `x` becomes, too.
// Off by up to 2^-9.5 of x, a third more than what rounding x to a half first costs.
template <class T, u32... TERMS> DEVICE u32 gated(float (&x)[2]) {
  constexpr u32 HALF = 0x38003800, EIGHTH = 0x30003000, LEAST = 0xfbfffbff, C[] = {TERMS...};
  constexpr int COUNT = sizeof...(TERMS);
  static_assert(COUNT >= 1 && COUNT <= 3, "");
  const u32 own = pack_half2(x[0], x[1]);
  u32 factor = C[0];
  if constexpr (COUNT == 2) {
    factor = fma_halves(mul_halves(own, own), C[1], C[0]);
  } else if constexpr (COUNT == 3) {
    const u32 eighth = mul_halves(own, EIGHTH), square = mul_halves_to_one(eighth, eighth);
    factor = fma_halves(fma_halves(square, C[2], C[1]), square, C[0]);
  }
  const u32 gate = tanh_halves(mul_halves(own, factor));
  if constexpr (same<T, half>::value) {
    const u32 halved = mul_halves(max_halves(own, LEAST), HALF);  // −∞ · 0 is NaN
    const u32 word = fma_halves(halved, gate, halved);
    x[0] = low_half(word);
    x[1] = high_half(word);
    return word;
  } else {  // which goes beyond the halves' range
    static_assert(same<T, bfloat16>::value, "");
    constexpr float LEAST_FLOAT = -3.3895314e38f;
    const float low = 0.5f * max_nan(x[0], LEAST_FLOAT), high = 0.5f * max_nan(x[1], LEAST_FLOAT);
    x[0] = fmaf(low, low_half(gate), low);
    x[1] = fmaf(high, high_half(gate), high);
    return pack_pair<T>(x[0], x[1]);
  }
}
