// How the patches of a convolution reach the pipeline on wgmma (mma/wgmma_pipeline.cuh): rows are output pixels (image, z, y, x), columns
// output channels, k runs over (kernel position, input channel). The copy engine gathers the patches, a panel of PANEL_BYTES of
// channels at one kernel position after the other; what it finds outside the image, or beyond the channels, is zero. The filters
// [group · n, k] have their channels padded to whole panels (`blocks` of them a position).
// Where blocks in pairs share the pixels (CLUSTER_N 2, mma/cluster.cuh), each brings half of them to both.
// config: depth: three spatial axes, not two; grouped: along the grid's z, and then panels do not reach into the next group.
#pragma once
#include "mma/wgmma_pipeline.cuh"
#include "ptx/tma_im2col.cuh"

constexpr bool DEPTH = config::depth;
constexpr u32 PANEL_CHANNELS = PANEL_BYTES / sizeof(Element);
constexpr u32 OWN_PIXELS = TILE_M / CLUSTER_N;  // of a tile, which this block brings
static_assert(TILE_M % CLUSTER_N == 0 && OWN_PIXELS % 8 == 0, "they start at a swizzle atom");

// The first of them in the tile.
DEVICE u32 first_pixel() {
  if constexpr (CLUSTER_N > 1) return rank_of_sharer() * OWN_PIXELS;
  else return 0;
}
// Brings OWN_PIXELS to all blocks that share them. `place`: as `copy_pixels` has it.
template <class... PLACE> DEVICE void copy_shared_pixels(u32 destination, const TensorMap& map, u32 barrier, PLACE... place) {
  if constexpr (CLUSTER_N > 1) copy_pixels_to_blocks(destination, map, barrier, all_sharers<CLUSTER_N>(), place...);
  else copy_pixels(destination, map, barrier, place...);
}

// Where the patch of a tile's pixel number `row` begins, and the panel that comes next.
struct PatchWalk {
  static constexpr bool BATCHED = false;
  static constexpr int UNROLL = 1, AHEAD = PARTS * TILE_N <= 128 ? TILE_N / 32 : PARTS * TILE_N <= 256 ? 2 : 1;
  int x, y, z;            // where the patch of the first pixel begins; it may lie outside
  u32 image;
  u32 q, r, s, block;     // of the panel that comes next
  DEVICE PatchWalk(const Params& p, u32 row, u32 step) {
    const u32 line = row / p.out_w, plane = line / p.out_h;
    image = DEPTH ? plane / p.out_d : plane;
    x = static_cast<int>((row - line * p.out_w) * p.stride_w) - p.pad_w;
    y = static_cast<int>((line - plane * p.out_h) * p.stride_h) - p.pad_h;
    z = DEPTH ? static_cast<int>((plane - image * p.out_d) * p.stride_d) - p.pad_d : 0;
    const u32 panel = step * PANELS, tap = panel / p.blocks, tap_line = tap / p.kernel_w, tap_plane = tap_line / p.kernel_h;
    block = panel - tap * p.blocks;
    s = tap - tap_line * p.kernel_w;
    r = tap_line - tap_plane * p.kernel_h;
    q = tap_plane;
  }
  DEVICE static u32 column_of_b(u32 step) { return step * TILE_K; }
  DEVICE static constexpr u32 early(const Params&) { return 0; }
  DEVICE void advance(const Params& p) {
    if (++block == p.blocks) {
      block = 0;
      if (++s == p.kernel_w) {
        s = 0;
        if (++r == p.kernel_h) { r = 0; ++q; }
      }
    }
  }
};

struct PatchLoad : PatchWalk {
  DEVICE PatchLoad(const Params& p, u32 first_row, u32 step) : PatchWalk(p, first_row + first_pixel(), step) {}
  DEVICE void operator()(const Params& p, u32 destination, u32 barrier, u32) {
    const u32 own = destination + first_pixel() * PANEL_BYTES;
#pragma unroll
    for (int i = 0; i < PANELS; ++i) {
      // Beyond the last position: channels that there are not, since a pixel could hold infinities.
      const bool inside = q < p.kernel_d;
      const u32 channel = inside ? (GROUPED ? blockIdx.z * p.channels : 0) + block * PANEL_CHANNELS : p.all_channels;
      const u16 offset_x = inside ? s * p.dilation_w : 0, offset_y = inside ? r * p.dilation_h : 0;
      if constexpr (DEPTH) {
        const u16 offset_z = inside ? q * p.dilation_d : 0;
        copy_shared_pixels(own + i * PANEL, p.map_a, barrier, channel, x, y, z, image, offset_x, offset_y, offset_z);
      } else {
        copy_shared_pixels(own + i * PANEL, p.map_a, barrier, channel, x, y, image, offset_x, offset_y);
      }
      advance(p);
    }
  }
};
