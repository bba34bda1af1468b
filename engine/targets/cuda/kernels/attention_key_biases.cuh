// Biases of scores, in units of log2, as attention on wgmma takes them. `Bias` comes from attention_operands.py. Included by
// attention_biases.cuh and attention_decode.cuh.
#pragma once
#include "types.cuh"

// Powers of two by which a bias lies so far below another one that its exponential is 0 beside the other's: the scores of a query would
// have to differ by as much to make up for it.
constexpr float MASKED = 8192.0f;

// In units of log2. A finite bias stays finite, so that a row of equal, very negative ones is uniform, not empty.
template <class T> DEVICE float bias_log2(T bias) {
  const float wide = widen(bias), scaled = wide * 1.4426950408889634f;
  if constexpr (same<T, half>::value) return scaled;  // far from where fp32 ends
  else return wide == -INFINITY ? wide : fmaxf(scaled, -1e38f);
}

// The biases of this lane's keys, of COUNT times 32 from `key0` on. All loads are under way before the first is used: one that lies
// beyond the end reads the last key's instead, because a branch around it would wait for the one before.
template <int COUNT> DEVICE void key_biases(const Params& p, u32 batch, u32 head, u32 key0, float (&bias)[COUNT]) {
  const u32 first = key0 + (threadIdx.x & 31);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) bias[i] = Bias::at(p, batch, head, 0, min(first + 32 * i, p.keys - 1));
#pragma unroll
  for (int i = 0; i < COUNT; ++i) bias[i] = first + 32 * i < p.keys ? bias_log2(bias[i]) : -INFINITY;
}
