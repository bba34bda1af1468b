// The running maximum and the running sum of attention on wgmma, for the two rows that a lane has a part of. Included by
// attention_softmax.cuh and attention_decode.cuh.
#pragma once
#include "epilogue/math.cuh"
#include "ptx/pack.cuh"

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

// The exponentials of a later tile with the maxima as they are, which must not be −∞, as rounded pairs. Nothing is asked of the scores
// beforehand, which would take as many instructions as their sum: false where that says that a maximum may have been exceeded by more
// than GROWTH. Then `sum` is as it was, as the scores are in any case. What it does not notice has exponentials of up to MOST each.
template <bool SCALED, class T, int N>
DEVICE bool exponentials_below(u32 (&pairs)[N / 2], const float (&s)[N], float scale, const float (&maximum)[2], float (&sum)[2]) {
  constexpr int MOST = N / 2 << static_cast<int>(GROWTH);  // of a lane's part of a row, if each were exceeded by GROWTH
  static_assert(MOST <= 1 << 15, "a fp16 holds it");
  const float shift[2] = {maximum[0] * scale, maximum[1] * scale};
  float added[2] = {};
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const int h = i >> 1 & 1;
    const float x = exp2_approx(SCALED ? s[i] - shift[h] : fmaf(s[i], scale, -shift[h]));
    const float y = exp2_approx(SCALED ? s[i + 1] - shift[h] : fmaf(s[i + 1], scale, -shift[h]));
    added[h] += x;
    added[h] += y;
    pairs[i / 2] = pack_pair<T>(x, y);
  }
  const bool below = __all_sync(~0u, added[0] <= MOST && added[1] <= MOST);  // not where one is NaN
  if (below) {
    sum[0] += added[0];
    sum[1] += added[1];
  }
  return below;
}
