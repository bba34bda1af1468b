// Biases of attention_wgmma.cuh: one number a key, which a warp brings to shared memory and which tell what tiles can be skipped, or
// one a score, in tiles that the copy engine brings. Included there behind the constants.
#pragma once
#include "attention_items.cuh"
#include "attention_key_biases.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/tma_outer.cuh"

// The tiles of keys of an item that can matter, a bit each; up to 32. A tile does not matter where the largest of its biases lies so far
// below the largest of all that its exponentials are 0 beside those of other keys: by MASKED powers of two, which the scores of a query
// would have to differ by to make up for it. Called by a whole warp.
DEVICE u32 live_tiles(const Params& p, const Item& item, u32 batch, u32 head) {
  // Of a tile, and in flight together: as many as the scout has registers for.
  constexpr int EACH = KEYS / 32, TILES = (PRODUCER_REGISTERS < 40 ? 4 : 8) / EACH, LOADS = TILES * EACH;
  const u32 lane = threadIdx.x & 31;
  float largest = -INFINITY;  // of tile `lane`
#pragma unroll 1
  for (u32 tile = 0; tile < item.tiles; tile += TILES) {
    float bias[LOADS];
    key_biases(p, batch, head, tile * KEYS, bias);
#pragma unroll
    for (int t = 0; t < TILES; ++t) {
      float m = bias[t * EACH];
#pragma unroll
      for (int i = 1; i < EACH; ++i) m = max_nan(m, bias[t * EACH + i]);
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) m = max_nan(m, __shfl_xor_sync(~0u, m, distance));
      if (tile + t == lane) largest = m;
    }
  }
  float all = largest;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) all = max_nan(all, __shfl_xor_sync(~0u, all, distance));
  // Of a difference that is not a number, and of none, nothing is known: with every key masked alike all tiles stay.
  return __ballot_sync(~0u, !(all - largest >= MASKED)) & ~0u >> (32 - item.tiles);
}

// A tile of biases, one a score: panels of rows of 128 bytes of keys, or of 64 where those come out even.
struct BiasTile {
  using T = config::bias_type;
  static constexpr int SIZE = sizeof(T), ROW_BYTES = KEYS * SIZE % 128 ? 64 : 128, PANEL = ROW_BYTES / SIZE, PITCH = QUERIES * ROW_BYTES;
  static constexpr int PANELS = FULL ? KEYS / PANEL : 0, BYTES = PANELS * PITCH;
  static_assert(!FULL || KEYS % PANEL == 0, "whole panels");
  struct alignas(2 * SIZE) Pair { T x, y; };

  DEVICE static void copy(u32 tile, const Params& p, u32 landed, u32 key, u32 query, u32 head, u32 batch) {
#pragma unroll
    for (int i = 0; i < PANELS; ++i) copy_box(tile + i * PITCH, FullBias::map(p), landed, key + i * PANEL, query, head, batch);
  }
  // Where a lane's first pair lies: keys 2 (lane % 4) and the next of its first row.
  DEVICE static u32 start(u32 row) {
    const u32 linear = row * ROW_BYTES;
    return linear + (threadIdx.x & 3) * 2 * SIZE ^ (linear >> 7 & ROW_BYTES / 16 - 1) << 4;
  }
  // Pair `block`, 8 keys further each, of the first row or of the one 8 below: under the swizzle a step along a row is an exclusive or.
  DEVICE static Pair pair(const u8* tile, u32 start, int block, int lower) {
    constexpr int BLOCKS = PANEL / 8;
    return *reinterpret_cast<const Pair*>(tile + (start ^ block % BLOCKS * 8 * SIZE) + block / BLOCKS * PITCH + lower * 8 * ROW_BYTES);
  }
};
