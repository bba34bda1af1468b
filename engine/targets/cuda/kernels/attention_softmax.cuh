// From scores to exponentials in attention_wgmma.cuh. Included there behind the constants.
#pragma once
#include "attention_biases.cuh"
#include "attention_running.cuh"

// Biases meet the scores of a tile of keys, and those that a query must not see become −∞. `masked`: there are such. `bias_tile`: the
// biases of the tile's scores, of which this lane's begin at `bias_start`.
DEVICE void prepare_scores(
    const Params& p, float (&s)[KEYS / 2], const float* biases, const u8* bias_tile, u32 bias_start, bool masked, u32 keys, u32 key0,
    u32 query) {
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
    const u32 end = keys_to(p, query, keys), lower_end = keys_to(p, query + 8, keys);
    const int seen = static_cast<int>(end - key0 - quad * 2), lower_seen = static_cast<int>(lower_end - key0 - quad * 2);
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i)
      if (i / 4 * 8 + (i & 1) >= (i & 2 ? lower_seen : seen)) s[i] = -INFINITY;
    if constexpr (WINDOW) {
      const int first = static_cast<int>(keys_from(p, query) - key0 - quad * 2);
      const int lower_first = static_cast<int>(keys_from(p, query + 8) - key0 - quad * 2);
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i)
        if (i / 4 * 8 + (i & 1) < (i & 2 ? lower_first : first)) s[i] = -INFINITY;
    }
  }
}

// Without a bias the scale, which is positive, meets the scores in the exponential only.
constexpr bool SCALED = BIAS || FULL;
DEVICE float scale_of(const Params& p) { return SCALED ? 1.0f : p.scale_log2; }
