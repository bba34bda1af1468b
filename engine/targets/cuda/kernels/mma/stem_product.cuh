// The product of a stem on wgmma: 64 pixels, 16 a warp, by the weights of a slab of columns. Included by conv_stem_wgmma.cuh.
#pragma once
#include "mma/stem_window.cuh"
#include "ptx/barrier.cuh"
#include "ptx/wgmma_panels.cuh"

static_assert(config::warps == 4, "a warpgroup");
constexpr int WEIGHT_ROW = 2 * COLUMNS;         // bytes of shared memory, of one of k
constexpr int TOGETHER = STEPS <= 12 ? STEPS : 8;  // steps whose operands a lane has registers for

// d: the sums of the warp's 16 pixels.
DEVICE void multiply_pairs(float (&d)[4 * BLOCKS], const u32 (&source)[2], const PairTable& table, u64 weights) {
#pragma unroll
  for (int first = 0; first < STEPS; first += TOGETHER) {
    u32 a[TOGETHER][4];
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i)
      if (first + i < STEPS) load_pairs(a[i], source, table[2 * (first + i)], table[2 * (first + i) + 1]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i)
      if (first + i < STEPS) wgmma<COLUMNS, Element>(d, a[i], weights + (first + i) * (16 * WEIGHT_ROW >> 4), first + i > 0);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i)
      if (first + i < STEPS) wgmma_keep(a[i]);
  }
  wgmma_settle(d);
}
