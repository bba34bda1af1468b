// From scores to exponentials in attention_wgmma.cuh. Included there behind the constants.
#pragma once
#include "attention_biases.cuh"
#include "epilogue/math.cuh"

constexpr float GROWTH = 8.0f;  // by how many powers of two a maximum is exceeded before it is replaced

// The scores of a tile of keys become exponentials. A maximum stays while no lane of the warp exceeds it by more than GROWTH: exponentials
// and their sum may then be 2^GROWTH too large alike. True where it was replaced: what was summed up before has to be multiplied
// with `correction`. `masked`: the tile has keys that some query must not see. `bias_tile`: the biases of its scores, of which this
// lane's begin at `bias_start`.
DEVICE bool exponentials(
    const Params& p, float (&s)[KEYS / 2], const float* biases, const u8* bias_tile, u32 bias_start, bool masked, u32 keys, u32 key0,
    u32 query, float (&maximum)[2], float (&sum)[2], float (&correction)[2]) {
  const u32 quad = threadIdx.x & 3;
  if constexpr (BIAS) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) s[i] = fmaf(s[i], p.scale_log2, biases[i / 4 * 8 + quad * 2 + (i & 1)]);
  }
  if constexpr (FULL) {
#pragma unroll
    for (int i = 0; i < KEYS / 8; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto pair = BiasTile::pair(bias_tile, bias_start, i, h);
        s[4 * i + 2 * h] = fmaf(s[4 * i + 2 * h], p.scale_log2, bias_log2(pair.x));
        s[4 * i + 2 * h + 1] = fmaf(s[4 * i + 2 * h + 1], p.scale_log2, bias_log2(pair.y));
      }
    }
  }
  if (masked) {
    // Keys that the lane's first query sees, counted from its first column of the tile; of the other it sees 8 more.
    const u32 end = CAUSAL ? min(keys, query + 1) : keys, lower_end = CAUSAL ? min(keys, query + 9) : keys;
    const int seen = static_cast<int>(end - key0 - quad * 2), lower_seen = static_cast<int>(lower_end - key0 - quad * 2);
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i)
      if (i / 4 * 8 + (i & 1) >= (i & 2 ? lower_seen : seen)) s[i] = -INFINITY;
  }
  // Without a bias the scale, which is positive, meets the scores in the exponential only.
  const float scale = BIAS || FULL ? 1.0f : p.scale_log2;
  float highest[2], shift[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    highest[h] = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
    for (int i = 4; i < KEYS / 2; i += 4) highest[h] = fmaxf(highest[h], fmaxf(s[i + 2 * h], s[i + 2 * h + 1]));
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
  for (int i = 0; i < KEYS / 2; ++i) {
    s[i] = exp2_approx(BIAS || FULL ? s[i] - shift[i >> 1 & 1] : fmaf(s[i], scale, -shift[i >> 1 & 1]));
    sum[i >> 1 & 1] += s[i];
  }
  return grown;
}
