// GELU for results of one type: as good as that needs.
#pragma once
#include "epilogue/math.cuh"

// x Φ(x) as `gelu_narrow` of math.cuh, with a polynomial of a degree less (least maxima over 0 … 5.7, by linear programming). For half
// the error is below 2^-13.8 of the result + 2^-27; for bfloat16 below 2^-11.7 of it for x > −5.7, and below 2^-36 beyond.
template <class T> DEVICE float gelu_for(float x) {
  constexpr bool HALF = same<T, half>::value;
  static_assert(HALF || same<T, bfloat16>::value, "");
  const float t = fminf(fabsf(x), 16.0f);
  const float below = HALF ? exp2_approx(fmaf(t, fmaf(t, fmaf(t, fmaf(t, fmaf(t, -3.3473204e-4f, 5.96717e-3f), -4.8707269e-2f),
                                                            -0.46349806f), -1.1494462f), -1.0001083f))
                           : exp2_approx(fmaf(t, fmaf(t, fmaf(t, fmaf(t, fmaf(t, -2.1988708e-4f, 4.7031919e-3f), -4.3882197e-2f),
                                                            -0.47091999f), -1.1455223f), -1.0004324f));
  return fmaf(-t, below, max_nan(x, 0.0f));
}
