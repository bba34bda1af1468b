// GELU for results of one type: as good as that needs.
#pragma once
#include "epilogue/math.cuh"

// x Φ(x) of several numbers as `gelu_narrow` of math.cuh, with a polynomial of a degree less (least maxima over 0 … 5.7, by linear
// programming). For half the error is below 2^-13.8 of the result + 2^-27; for bfloat16 below 2^-11.7 of it for x > −5.7, and below
// 2^-36 beyond. Step by step for all of them: one number alone waits four cycles for each step and twenty for the exponential.
template <class T, int PLACES, int COLUMNS> DEVICE void gelu_all(float (&x)[PLACES][COLUMNS]) {
  constexpr bool HALF = same<T, half>::value;
  static_assert(HALF || same<T, bfloat16>::value, "");
  constexpr float C[6] = {HALF ? -1.0001083f : -1.0004324f, HALF ? -1.1494462f : -1.1455223f,       HALF ? -0.46349806f : -0.47091999f,
                          HALF ? -4.8707269e-2f : -4.3882197e-2f, HALF ? 5.96717e-3f : 4.7031919e-3f, HALF ? -3.3473204e-4f : -2.1988708e-4f};
  constexpr int N = PLACES * COLUMNS;
  float t[N], below[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    t[i] = fminf(fabsf(x[i / COLUMNS][i % COLUMNS]), 16.0f);
    below[i] = C[5];
  }
#pragma unroll
  for (int power = 4; power >= 0; --power)
#pragma unroll
    for (int i = 0; i < N; ++i) below[i] = fmaf(t[i], below[i], C[power]);
#pragma unroll
  for (int i = 0; i < N; ++i) below[i] = exp2_approx(below[i]);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float& one = x[i / COLUMNS][i % COLUMNS];
    one = fmaf(-t[i], below[i], max_nan(one, 0.0f));
  }
}
