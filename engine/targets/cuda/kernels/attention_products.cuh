// The two products of attention on wgmma, of a warpgroup's 64 rows and a tile of keys. Included behind the constants and the tiles.
#pragma once
#include "ptx/pack.cuh"
#include "ptx/wgmma_panels.cuh"

// Begins s = q kᵀ. `q` and `k` are descriptors of tiles.
DEVICE void multiply_keys(float (&s)[KEYS / 2], u64 q, u64 k) {
  constexpr int STEPS = KTile::ROW_BYTES / 32;  // of a panel
  // NOTES: the descriptors of a wide head do not fit the uniform registers all at once, so its panels are a loop; each is a group,
  // or NVRTC 13.0 puts a `warpgroup.arrive` behind the loop.
  constexpr int ALL = HEAD / 16, TOGETHER = ALL > 8 ? STEPS : ALL;
  static_assert(ALL % TOGETHER == 0, "whole panels");
#pragma unroll 1
  for (int panel = 0; panel < ALL / TOGETHER; ++panel) {
    const u64 q_panel = q + panel * (QTile::PITCH >> 4), k_panel = k + panel * (KTile::PITCH >> 4);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i)
      wgmma<KEYS, Element>(
          s, q_panel + i / STEPS * (QTile::PITCH >> 4) + i % STEPS * 2, k_panel + i / STEPS * (KTile::PITCH >> 4) + i % STEPS * 2,
          i > 0 || panel > 0);
    wgmma_commit();
  }
}

// Begins out = p v, plus out itself where `accumulate`.
DEVICE void multiply_values(float (&out)[VALUE / 2], const u32 (&probabilities)[KEYS / 4], u64 v, bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < KEYS / 16; ++i)
    wgmma<VALUE, Element>(
        out, *reinterpret_cast<const u32(*)[4]>(&probabilities[4 * i]), v + i * (16 * VTile::ROW_BYTES >> 4), i > 0 || accumulate);
  wgmma_commit();
}

// The accumulators of 16 keys are, rounded, operand A.
DEVICE void round_pairs(u32 (&probabilities)[KEYS / 4], const float (&s)[KEYS / 2]) {
#pragma unroll
  for (int i = 0; i < KEYS / 4; ++i) probabilities[i] = pack_pair<Element>(s[2 * i], s[2 * i + 1]);
}
