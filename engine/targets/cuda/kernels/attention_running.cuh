// The running maximum and the running sum of attention on wgmma, for the two rows that a lane has a part of. Included by
// attention_softmax.cuh and attention_decode.cuh.
#pragma once
#include "epilogue/math.cuh"

constexpr float GROWTH = 8.0f;  // by how many powers of two a maximum is exceeded before it is replaced

// Scores become exponentials of scale · s, in units of log2; hidden ones are −∞. A maximum (of s) stays while no lane of the warp exceeds
// it by more than GROWTH: exponentials and their sum may then be 2^GROWTH too large alike. True where it was replaced: what was summed up
// before has to be multiplied with `correction`.
template <bool SCALED, int N>
DEVICE bool running_exponentials(float (&s)[N], float scale, float (&maximum)[2], float (&sum)[2], float (&correction)[2]) {
  float highest[2], shift[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    highest[h] = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
    for (int i = 4; i < N; i += 4) highest[h] = fmaxf(highest[h], fmaxf(s[i + 2 * h], s[i + 2 * h + 1]));
    highest[h] = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], 1));
    highest[h] = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], 2));
  }
  const auto shift_of = [&](float m) { return m == -INFINITY ? 0.0f : m * scale; };  // of a row masked so far every exponential is 0, not NaN
  const bool grown = __any_sync(~0u, (highest[0] - maximum[0]) * scale > GROWTH || (highest[1] - maximum[1]) * scale > GROWTH);
  if (grown) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float m = fmaxf(maximum[h], highest[h]);
      correction[h] = exp2_approx(fmaf(maximum[h], scale, -shift_of(m)));
      maximum[h] = m;
      sum[h] *= correction[h];
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) shift[h] = shift_of(maximum[h]);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    s[i] = exp2_approx(SCALED ? s[i] - shift[i >> 1 & 1] : fmaf(s[i], scale, -shift[i >> 1 & 1]));
    sum[i >> 1 & 1] += s[i];
  }
  return grown;
}
