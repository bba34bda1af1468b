// Convolution of an image with few channels as conv_stem.cuh, for sm_90a: on wgmma, whose operand A comes from registers, the pairs of the
// window as they are read, and whose operand B, the weights, every warp of the block shares: rows of shared memory are k, swizzled as
// they are packed. A warpgroup takes eight units of pixels at a time.
#pragma once
#include "mma/stem_product.cuh"

constexpr int ITEMS = (ROWS * UNITS + 7) / 8;

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 weights = shared_address(shared), window = weights + W_BYTES;
  let_next_kernel_start();
  load_weights(p, weights);
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 warp = threadIdx.x / 32, column0 = blockIdx.y * COLUMNS;
  const PairTable table(threadIdx.x & 3);
  const u64 b = panel_descriptor<WEIGHT_ROW>(weights, 0);
  for (u32 index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile = tile_of(p, index);
    load_window(p, tile, window);
    copy_async_wait<0>();
    shared_writes_fence();
    __syncthreads();  // window and weights are complete for all threads
    if (config::planes > 0 && index + gridDim.x < p.tiles) prefetch_window(p, tile_of(p, index + gridDim.x));

#pragma unroll 1
    for (u32 item = 0; item < ITEMS; ++item) {
      const FragmentPixels pixels(p, tile, window, item * 8 + warp * 2);
      float d[4 * BLOCKS];
      multiply_pairs(d, pixels.source, table, b);
      store_fragment(p, d, pixels.output, column0);
    }
    __syncthreads();  // all have left the window
  }
  stamp_end(p.stamp);
}
