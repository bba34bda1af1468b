// Convolution of an image with few channels as conv_stem_wgmma.cuh, of whose results only the maxima over windows of 3 × 3 pixels, two apart,
// are stored, as residual networks have them behind their first layer.
//
// Each warp has a strip of 16 pixels beside each other, in which seven windows lie, and walks down: it keeps the sums of a window's last
// line, which is the next one's first. Four lanes apart lie neighbouring pixels: such a pair of lanes changes half of its columns' sums,
// and then each has the first two pixels of one window; the third is another lane's first. Sums outside the image do not count.
// config: windows: of a strip in a tile, one below the other; rows: their lines.
#pragma once
#include "mma/stem_product.cuh"
#include "ptx/arithmetic.cuh"

constexpr int STRIP_WINDOWS = 7, ACROSS = config::warps * STRIP_WINDOWS;  // of a tile in a line
static_assert(ROWS == 2 * config::windows + 1, "");

// The first window of a tile, and its first pixel, which may lie outside.
DEVICE Tile windows_of(const Params& p, u32 index) {
  const u32 across = (p.windows_w + ACROSS - 1) / ACROSS, down = (p.windows_h + config::windows - 1) / config::windows;
  const u32 line = index / across, image = line / down;
  return {image, (line - image * down) * config::windows, (index - line * across) * ACROSS};
}
DEVICE Tile pixels_of(const Params& p, const Tile& windows) { return {windows.image, 2 * windows.y - p.above, 2 * windows.x - p.before}; }

// Sums outside the image become −∞. `there`: whether the lane's two pixels are in the line; `whole`: whether all of the warp's are.
DEVICE void leave_inside(float (&d)[4 * BLOCKS], bool line_there, const bool (&there)[2], bool whole) {
  if (line_there && whole) return;
#pragma unroll
  for (int i = 0; i < 4 * BLOCKS; ++i) d[i] = line_there && there[i / 2 % 2] ? d[i] : -INFINITY;
}

// The maxima of a lane's window, of the columns that it has sums of, where `d` are those of the strip's pixels over the lines of windows.
DEVICE void strip_maxima(const float (&d)[4 * BLOCKS], float (&maxima)[2 * BLOCKS]) {
  const u32 lane = threadIdx.x & 31, octet = lane / 4, next = octet == 6 ? 1 : octet + 2;  // window k is octet 2k's, or 2 (k − 4) + 1's
  const bool odd = octet & 1;
#pragma unroll
  for (int i = 0; i < 2 * BLOCKS; ++i) {
    const int left = i / 2 * 4 + i % 2;  // of the strip's first eight pixels; two on: of the others
    const float own = odd ? d[left + 2] : d[left], other = __shfl_xor_sync(~0u, odd ? d[left] : d[left + 2], 4);
    maxima[i] = max_nan(max_nan(own, other), __shfl_sync(~0u, odd ? other : own, (next * 4 + lane % 4) & 31));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 weights = shared_address(shared), window = weights + W_BYTES;
  let_next_kernel_start();
  load_weights(p, weights);
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32, octet = lane / 4, column0 = blockIdx.y * COLUMNS;
  const u32 first_pixel = 2 * STRIP_WINDOWS * warp + octet, own_window = octet % 2 ? 4 + octet / 2 : octet / 2;
  const PairTable table(lane & 3);
  const u64 b = panel_descriptor<WEIGHT_ROW>(weights, 0);
  for (u32 index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile first = windows_of(p, index), tile = pixels_of(p, first);
    load_window(p, tile, window);
    copy_async_wait<0>();
    shared_writes_fence();
    __syncthreads();  // window and weights are complete for all threads
    if (config::planes > 0 && index + gridDim.x < p.tiles) prefetch_window(p, pixels_of(p, windows_of(p, index + gridDim.x)));

    u32 source[2];
    bool there[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      source[i] = window + (first_pixel + 8 * i) * PIXEL_BYTES + (config::regular ? 4 * (lane & 3) : 0);
      there[i] = tile.x + first_pixel + 8 * i < p.out_w;
    }
    const bool whole = __all_sync(~0u, there[0] && there[1]);
    const auto multiply_line = [&](float (&d)[4 * BLOCKS], u32 row) {
      const u32 lines = row * (STRIDE_H * ROW_BYTES), both[2] = {source[0] + lines, source[1] + lines};
      multiply_pairs(d, both, table, b);
      leave_inside(d, tile.y + row < p.out_h, there, whole);
    };
    float last[4 * BLOCKS];
    multiply_line(last, 0);
    const u32 ahead = first.x + STRIP_WINDOWS * warp + own_window;
    const bool stored = own_window < STRIP_WINDOWS && ahead < p.windows_w;
#pragma unroll 1
    for (u32 i = 0; i < config::windows && first.y + i < p.windows_h; ++i) {
      float middle[4 * BLOCKS];
      multiply_line(middle, 2 * i + 1);
#pragma unroll
      for (int j = 0; j < 4 * BLOCKS; ++j) middle[j] = max_nan(middle[j], last[j]);
      multiply_line(last, 2 * i + 2);
#pragma unroll
      for (int j = 0; j < 4 * BLOCKS; ++j) middle[j] = max_nan(middle[j], last[j]);
      float maxima[2 * BLOCKS];
      strip_maxima(middle, maxima);
      const u32 output = (first.image * p.windows_h + first.y + i) * p.windows_w + ahead;
#pragma unroll
      for (int group = 0; group < BLOCKS / 4; ++group) {
        const u32 column = column0 + 32 * group + 8 * (lane & 3);
        if (!stored || column >= p.n) continue;
        float v[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j] = maxima[2 * (4 * group + j)];
          v[4 + j] = maxima[2 * (4 * group + j) + 1];
        }
        const u32 count = min(8u, p.n - column);
        Epilogue::store(p, output, column, count, v, Epilogue::fetch(p, output, column, count));
      }
    }
    __syncthreads();  // all have left the window
  }
  stamp_end(p.stamp);
}
