// How the patches of a convolution reach the pipeline on wgmma (mma/wgmma_pipeline.cuh) whose results are maxima of 2 × 2 sums: as
// mma/patch_load.cuh, but the first half of a tile's rows are neighbours in an upper line of such windows, the other half the pixels
// below them. The map's walk takes upper lines only, and of these whole windows; the pixels below are its own moved by an offset.
// p.out_h counts pairs of lines, p.out_w pixels in whole windows, p.stride_h lies between upper lines, p.below from one to the lower one.
// Where blocks in pairs share the pixels (CLUSTER_N 2, mma/cluster.cuh), one brings the upper ones to both, and one the lower.
#pragma once
#include "mma/patch_load.cuh"

static_assert(!DEPTH && !GROUPED && TILE_M % 16 == 0, "halves start at a swizzle atom");

struct PooledLoad : PatchWalk {
  static constexpr u32 HALF = TILE_M / 2;
  DEVICE PooledLoad(const Params& p, u32 first_row, u32 step) : PatchWalk(p, first_row / 2, step) {}
  DEVICE void operator()(const Params& p, u32 destination, u32 barrier, u32) {
#pragma unroll
    for (int i = 0; i < PANELS; ++i) {
      const bool inside = q == 0;  // beyond the last position: channels that there are not, as in mma/patch_load.cuh
      const u32 channel = inside ? block * PANEL_CHANNELS : p.all_channels, panel = destination + i * PANEL;
      const u16 offset_x = inside ? s * p.dilation_w : 0, offset_y = inside ? r * p.dilation_h : 0;
      if constexpr (CLUSTER_N > 1) {
        const u32 lower = rank_of_sharer();
        copy_pixels_to_blocks(panel + lower * HALF * PANEL_BYTES, p.map_a, barrier, all_sharers<CLUSTER_N>(), channel, x, y, image, offset_x,
                              static_cast<u16>(offset_y + lower * p.below));
      } else {
        copy_pixels(panel, p.map_a, barrier, channel, x, y, image, offset_x, offset_y);
        copy_pixels(panel + HALF * PANEL_BYTES, p.map_a, barrier, channel, x, y, image, offset_x, static_cast<u16>(offset_y + p.below));
      }
      advance(p);
    }
  }
};
