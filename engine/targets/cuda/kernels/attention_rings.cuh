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

  // Of a tile in which a sequence may end: the boxes of BOX rows that hold its first `rows`, what they take, and copies of so many.
  template <int BOX> static constexpr u32 BOX_BYTES = BOX * BYTES / ROWS;
  template <int BOX> DEVICE static u32 boxes_up_to(u32 rows) { return (min(rows, static_cast<u32>(ROWS)) + BOX - 1) / BOX; }
  template <int BOX> DEVICE static void copy_boxes(u32 boxes, u32 tile, const TensorMap& map, u32 landed, u32 row, u32 head) {
    static_assert(ROWS % BOX == 0 && BOX * ROW_BYTES % 1024 == 0, "boxes start at a swizzle atom");
#pragma unroll 1
    while (boxes-- > 0) copy(tile + boxes * BOX * ROW_BYTES, map, landed, row + boxes * BOX, head, 0);
  }
  // The same and what `landed` waits for; the whole tile at once by a map of its own.
  template <int BOX>
  DEVICE static void bring_up_to(u32 rows, u32 tile, const TensorMap& whole, const TensorMap& box, u32 landed, u32 row, u32 head) {
    const u32 boxes = boxes_up_to<BOX>(rows);
    barrier_arrive_expect(landed, boxes * BOX_BYTES<BOX>);
    if (boxes == ROWS / BOX) copy(tile, whole, landed, row, head, 0);
    else copy_boxes<BOX>(boxes, tile, box, landed, row, head);
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
