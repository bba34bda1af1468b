// How a product's first operand reaches shared memory on wgmma (mma/wgmma_pipeline.cuh): as rows of a matrix. b may come in parts that add
// up to it, in turn for every step of k.
#pragma once
#include "mma/wgmma_pipeline.cuh"

constexpr u32 PARTS_OF_B = config::parts;

struct RowLoad {
  static constexpr bool BATCHED = false;
  static constexpr int UNROLL = 4, PIECES = TILE_N / 16;
  static constexpr int AHEAD = PARTS * TILE_N <= 128 ? PIECES : PARTS * TILE_N > 256 ? 1 : PIECES % 4 == 0 ? 4 : 2;
  u32 row;
  DEVICE RowLoad(const Params&, u32 row, u32) : row(row) {}
  DEVICE void operator()(const Params& p, u32 destination, u32 barrier, u32 step) {
    copy_box(destination, p.map_a, barrier, step / PARTS_OF_B * TILE_K, row);
  }
};
