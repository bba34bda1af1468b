// Tiles that the copy engine fills in shared memory, and rings of them between a producer and its consumers. Included by
// attention_memory.cuh and attention_decode.cuh.
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/tma_outer.cuh"

// A tile in shared memory: panels of 64 features, or 32 where they do not come out even, each of ROWS rows of ROW_BYTES.
template <int ROWS, int FEATURES> struct Tile {
  static constexpr int PANEL = FEATURES % 64 ? 32 : 64, ROW_BYTES = PANEL * 2, PITCH = ROWS * ROW_BYTES;
  static constexpr int PANELS = FEATURES / PANEL, BYTES = PANELS * PITCH;
  static_assert(FEATURES % PANEL == 0 && PITCH % 1024 == 0, "panels start at a swizzle atom");

  DEVICE static void copy(u32 tile, const TensorMap& map, u32 landed, u32 row, u32 head, u32 batch) {
#pragma unroll
    for (int i = 0; i < PANELS; ++i) copy_box(tile + i * PITCH, map, landed, i * PANEL, row, head, batch);
  }
};

// A ring of tiles: which is `turn`'s, and the parity of its phase. A fresh barrier counts as completed in the phase before its first.
template <int DEPTH> struct Ring {
  u32 tiles, bytes, full, empty;
  DEVICE u32 tile(u32 turn) const { return tiles + turn % DEPTH * bytes; }
  DEVICE u32 landed(u32 turn) const { return full + 8 * (turn % DEPTH); }
  DEVICE void wait_full(u32 turn) const { barrier_wait(full + 8 * (turn % DEPTH), turn / DEPTH & 1); }
  DEVICE void wait_empty(u32 turn) const { barrier_wait(empty + 8 * (turn % DEPTH), turn / DEPTH & 1 ^ 1); }
  // Called by all lanes of a warp.
  DEVICE void leave(u32 turn) const {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(empty + 8 * (turn % DEPTH));
  }
  // Each lane for itself, of what all of them have read.
  DEVICE void leave_each(u32 turn) const { barrier_arrive(empty + 8 * (turn % DEPTH)); }
};
