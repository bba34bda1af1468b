// Convolution of an image with few channels (the first layer of a network) on mma.sync, reading the image as it comes: any strides,
// fp32 or the operands' type. Its output is what costs, so every input is read once a tile: a block brings the window of its tile of
// output pixels to shared memory, pixel by pixel with CHANNELS side by side, rounded to the operands' type. What one row of the filter
// meets of an output pixel is then one run of halves, and a register of operand A (two neighbouring elements of k) one 4-byte read.
//
// k runs over pairs of elements: ROW_PAIRS for a row of the filter, the last ones padded with zero weights. A half step (8 of k) is
// four pairs, one a lane of a quad. config::regular: half steps do not cross rows of the filter, so where a pair lies is known at
// compile time; else every lane keeps a table. Pixels come in units of eight neighbours; a fragment is any two units.
//
// w is packed [slab of columns][step][two 8-column blocks][lane][4 words], as the lanes load it; its columns are interleaved
// (Arrangement::STRIDE_4 of epilogue/fragment.cuh), so that a lane's accumulators are eight neighbouring columns. NOTES: a weight of
// zero meets what lies beside the window, so an infinity in the image can reach outputs up to ROW_PAIRS away as NaN.
#pragma once
#include "mma/stem_window.cuh"
#include "mma/tile.cuh"

constexpr int FRAGMENTS = config::fragments;
constexpr int ITEMS = (ROWS * UNITS + 2 * FRAGMENTS - 1) / (2 * FRAGMENTS);  // what a warp does at a time

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 weights = shared_address(shared), window = weights + W_BYTES;
  let_next_kernel_start();
  load_weights(p, weights);
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32, column0 = blockIdx.y * COLUMNS;
  const PairTable table(lane & 3);
  for (u32 index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile = tile_of(p, index);
    load_window(p, tile, window);
    copy_async_wait<0>();
    __syncthreads();  // window and weights are complete for all threads
    if (config::planes > 0 && index + gridDim.x < p.tiles) prefetch_window(p, tile_of(p, index + gridDim.x));

#pragma unroll 1
    for (u32 item = warp; item < ITEMS; item += config::warps) {
      u32 source[FRAGMENTS][2], output[FRAGMENTS][2];
#pragma unroll
      for (int m = 0; m < FRAGMENTS; ++m) {
        const FragmentPixels pixels(p, tile, window, (item * FRAGMENTS + m) * 2);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          source[m][i] = pixels.source[i];
          output[m][i] = pixels.output[i];
        }
      }

      float d[FRAGMENTS][4 * BLOCKS] = {};
      const u32 w_lane = weights + lane * 16;
#pragma unroll(STEPS <= 16 ? STEPS : 4)
      for (int step = 0; step < STEPS; ++step) {
        typename MmaOperand<Element>::Fragment a[FRAGMENTS], b[BLOCKS / 2];
#pragma unroll
        for (int m = 0; m < FRAGMENTS; ++m) load_pairs(a[m].word, source[m], table[2 * step], table[2 * step + 1]);
#pragma unroll
        for (int j = 0; j < BLOCKS / 2; ++j) {
          const uint4 words = load_shared_16(w_lane + (step * (BLOCKS / 2) + j) * 512);
          b[j].word[0] = words.x, b[j].word[1] = words.y, b[j].word[2] = words.z, b[j].word[3] = words.w;
        }
#pragma unroll
        for (int m = 0; m < FRAGMENTS; ++m) MmaOperand<Element>::multiply(d[m], a[m], b);
      }
#pragma unroll
      for (int m = 0; m < FRAGMENTS; ++m) store_fragment(p, d[m], output[m], column0);
    }
    __syncthreads();  // all have left the window
  }
  stamp_end(p.stamp);
}
