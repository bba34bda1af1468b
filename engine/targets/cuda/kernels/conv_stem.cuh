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
#include "epilogue/access.cuh"
#include "mma/tile.cuh"
#include "ptx/grid.cuh"
#include "ptx/pack.cuh"
#include "ptx/prefetch.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
using Image = config::x_t;
constexpr int CHANNELS = config::channels, PADDED = config::padded_channels;  // as they come, as they lie in shared memory
constexpr int KERNEL_H = config::kernel_h, STRIDE_H = config::stride_h, DILATION_H = config::dilation_h;
constexpr int STRIDE_W = config::stride_w, DILATION_W = config::dilation_w;
constexpr int ROWS = config::rows, UNITS = config::units, TILE_W = 8 * UNITS;  // the tile of output pixels
constexpr int WINDOW_H = (ROWS - 1) * STRIDE_H + (KERNEL_H - 1) * DILATION_H + 1, WINDOW_W = config::window_w;
constexpr int ROW_BYTES = WINDOW_W * PADDED * 2, PIXEL_BYTES = STRIDE_W * PADDED * 2;  // from input row to row, output pixel to pixel
constexpr int FRAGMENTS = config::fragments, BLOCKS = config::n_blocks, COLUMNS = 8 * BLOCKS, THREADS = 32 * config::warps;
constexpr int ITEMS = (ROWS * UNITS + 2 * FRAGMENTS - 1) / (2 * FRAGMENTS);  // what a warp does at a time
constexpr int ROW_PAIRS = config::row_pairs, STEPS = config::steps, HALF_STEPS = (KERNEL_H * ROW_PAIRS + 3) / 4;
constexpr int TAP_WORDS = PADDED > 1 ? PADDED / 2 : 1;  // of a dilated filter, whose taps do not touch
constexpr int W_BYTES = STEPS * BLOCKS * 256, W_CHUNKS = W_BYTES / 16;
static_assert(W_BYTES + WINDOW_H * ROW_BYTES == config::shared_bytes, "the host asks for the weights and the window");
static_assert(PIXEL_BYTES % 4 == 0 && ROW_BYTES % 4 == 0 && WINDOW_W % 2 == 0, "pairs are read and written as words");
static_assert(STEPS == (HALF_STEPS + 1) / 2 && BLOCKS % 4 == 0, "");

constexpr u32 NO_OUTPUT = ~0u;

struct Tile { u32 image, y, x; };  // its first output pixel

DEVICE Tile tile_of(const Params& p, u32 index) {
  const u32 across = (p.out_w + TILE_W - 1) / TILE_W, down = (p.out_h + ROWS - 1) / ROWS, line = index / across, image = line / down;
  return {image, (line - image * down) * ROWS, (index - line * across) * TILE_W};
}

template <class X> DEVICE u32 pair_of(X low, X high) {
  if constexpr (same<X, Element>::value) return low.bits | static_cast<u32>(high.bits) << 16;
  else return pack_pair<Element>(widen(low), widen(high));
}

// Two neighbouring pixels of the window.
DEVICE void store_pixels(u32 address, const Image (&value)[2][CHANNELS]) {
  Image run[2 * PADDED] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) run[i * PADDED + c] = value[i][c];
  u32 word[PADDED];
#pragma unroll
  for (int i = 0; i < PADDED; ++i) word[i] = pair_of(run[2 * i], run[2 * i + 1]);
  if constexpr (PADDED == 4) {
    store_shared_16(address, make_uint4(word[0], word[1], word[2], word[3]));
  } else {
#pragma unroll
    for (int i = 0; i < PADDED; ++i) store_shared_4(address + 4 * i, word[i]);
  }
}

// Brings the window of a tile, a warp a row and a lane two pixels; what lies outside the image becomes zero.
DEVICE void load_window(const Params& p, const Tile& tile, u32 window) {
  constexpr int ROW_ITEMS = WINDOW_W / 2, PASSES = (ROW_ITEMS + 31) / 32, AHEAD = PASSES < 4 ? PASSES : 4;
  const u32 lane = threadIdx.x & 31;
  const i64 pixel_step = config::pixel_step ? config::pixel_step : p.x_pixel, channel_step = config::channel_step ? config::channel_step : p.x_channel;
  const int y0 = static_cast<int>(tile.y * STRIDE_H) - p.pad_h, x0 = static_cast<int>(tile.x * STRIDE_W) - p.pad_w;
  const Image* image = p.x + tile.image * p.x_image;
#pragma unroll 1
  for (u32 row = threadIdx.x / 32; row < WINDOW_H; row += config::warps) {
    const int y = y0 + static_cast<int>(row);
    const bool row_inside = static_cast<u32>(y) < p.in_h;
#pragma unroll 1
    for (int first = 0; first < PASSES; first += AHEAD) {
      const int pair = 32 * first + lane, x = x0 + 2 * pair;
      const Image* pixel = image + y * p.x_row + x * pixel_step;
      Image value[AHEAD][2][CHANNELS] = {};
#pragma unroll
      for (int a = 0; a < AHEAD; ++a)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (row_inside && static_cast<u32>(x + 64 * a + i) < p.in_w && pair + 32 * a < ROW_ITEMS) {
#pragma unroll
            for (int c = 0; c < CHANNELS; ++c) value[a][i][c] = pixel[(64 * a + i) * pixel_step + c * channel_step];
          }
#pragma unroll
      for (int a = 0; a < AHEAD; ++a)
        if (pair + 32 * a < ROW_ITEMS) store_pixels(window + row * ROW_BYTES + (pair + 32 * a) * (4 * PADDED), value[a]);
    }
  }
}

// Asks the L2 cache for the window of a tile: one pixel in each of its lines (config::line_pixels), in every plane of the image.
DEVICE void prefetch_window(const Params& p, const Tile& tile) {
  constexpr int LINES = (WINDOW_W + config::line_pixels - 1) / config::line_pixels, COUNT = WINDOW_H * config::planes * LINES;
  const Image* image = p.x + tile.image * p.x_image;
  const int y0 = static_cast<int>(tile.y * STRIDE_H) - p.pad_h, x0 = static_cast<int>(tile.x * STRIDE_W) - p.pad_w;
  for (u32 item = threadIdx.x; item < COUNT; item += THREADS) {
    const u32 line = item / LINES, plane = line / WINDOW_H, row = line - plane * WINDOW_H;
    const int y = y0 + static_cast<int>(row), x = max(0, x0 + static_cast<int>((item - line * LINES) * config::line_pixels));
    if (static_cast<u32>(y) < p.in_h && x < static_cast<int>(p.in_w))
      prefetch_l2(image + y * p.x_row + x * p.x_pixel + plane * p.x_channel);
  }
}

// Where the pair of half step `i` that a lane reads lies from its pixel (and, if regular, from the lane's first pair) on.
DEVICE u32 pair_offset(u32 i, u32 quad) {
  if constexpr (config::regular) {
    const u32 last = min(i, static_cast<u32>(HALF_STEPS - 1)), row = last / (ROW_PAIRS / 4);  // a half step too many has zero weights
    return row * (DILATION_H * ROW_BYTES) + (last - row * (ROW_PAIRS / 4)) * 16;
  } else {
    const u32 pair = 4 * i + quad, row = pair / ROW_PAIRS, rest = pair - row * ROW_PAIRS;
    const u32 word = DILATION_W == 1 ? rest : rest / TAP_WORDS * (DILATION_W * TAP_WORDS) + rest % TAP_WORDS;
    return row < KERNEL_H ? row * (DILATION_H * ROW_BYTES) + 4 * word : 0;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 weights = shared_address(shared), window = weights + W_BYTES;
  let_next_kernel_start();
  // Filters are constants: no kernel before this one writes them.
  const Element* w = p.w + blockIdx.y * (W_BYTES / sizeof(Element));
  for (u32 i = threadIdx.x; i < W_CHUNKS; i += THREADS) copy_async_16(weights + 16 * i, w + 8 * i, true);
  copy_async_commit();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32, quad = lane & 3, column0 = blockIdx.y * COLUMNS;
  u32 table[config::regular ? 1 : 2 * STEPS];
  if constexpr (!config::regular) {
#pragma unroll
    for (int i = 0; i < 2 * STEPS; ++i) table[i] = pair_offset(i, quad);
  }

  for (u32 index = blockIdx.x; index < p.tiles; index += gridDim.x) {
    const Tile tile = tile_of(p, index);
    load_window(p, tile, window);
    copy_async_wait<0>();
    __syncthreads();  // window and weights are complete for all threads
    if (config::planes > 0 && index + gridDim.x < p.tiles) prefetch_window(p, tile_of(p, index + gridDim.x));

#pragma unroll 1
    for (u32 item = warp; item < ITEMS; item += config::warps) {
      // This lane's rows of the fragments: a pixel in each of two units. A unit past the end is computed from the last one.
      u32 pixel[FRAGMENTS][2], output[FRAGMENTS][2];
#pragma unroll
      for (int m = 0; m < FRAGMENTS; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const u32 named = (item * FRAGMENTS + m) * 2 + i, unit = min(named, static_cast<u32>(ROWS * UNITS - 1));
          const u32 row = unit / UNITS, column = (unit - row * UNITS) * 8 + lane / 4, y = tile.y + row, x = tile.x + column;
          pixel[m][i] = window + row * (STRIDE_H * ROW_BYTES) + column * PIXEL_BYTES + (config::regular ? 4 * quad : 0);
          output[m][i] = named == unit && y < p.out_h && x < p.out_w ? (tile.image * p.out_h + y) * p.out_w + x : NO_OUTPUT;
        }

      float d[FRAGMENTS][4 * BLOCKS] = {};
      const u32 w_lane = weights + lane * 16;
#pragma unroll(STEPS <= 16 ? STEPS : 4)
      for (int step = 0; step < STEPS; ++step) {
        typename MmaOperand<Element>::Fragment a[FRAGMENTS], b[BLOCKS / 2];
        const u32 low = config::regular ? pair_offset(2 * step, 0) : table[config::regular ? 0 : 2 * step];
        const u32 high = config::regular ? pair_offset(2 * step + 1, 0) : table[config::regular ? 0 : 2 * step + 1];
#pragma unroll
        for (int m = 0; m < FRAGMENTS; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            a[m].word[i] = load_shared_4(pixel[m][i] + low);
            a[m].word[2 + i] = load_shared_4(pixel[m][i] + high);
          }
#pragma unroll
        for (int j = 0; j < BLOCKS / 2; ++j) {
          const uint4 words = load_shared_16(w_lane + (step * (BLOCKS / 2) + j) * 512);
          b[j].word[0] = words.x, b[j].word[1] = words.y, b[j].word[2] = words.z, b[j].word[3] = words.w;
        }
#pragma unroll
        for (int m = 0; m < FRAGMENTS; ++m) MmaOperand<Element>::multiply(d[m], a[m], b);
      }

#pragma unroll
      for (int m = 0; m < FRAGMENTS; ++m) {
        // What is not stored is fetched from row or column 0: a load that always happens needs no merging.
        Epilogue::Inputs inputs[2][BLOCKS / 4];
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int group = 0; group < BLOCKS / 4; ++group) {
            const u32 named = column0 + 32 * group + 8 * quad, column = named < p.n ? named : 0;
            inputs[i][group] = Epilogue::fetch(p, output[m][i] != NO_OUTPUT ? output[m][i] : 0, column, min(8u, p.n - column));
          }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int group = 0; group < BLOCKS / 4; ++group) {
            const u32 column = column0 + 32 * group + 8 * quad;
            float v[8];
#pragma unroll
            for (int b = 0; b < 4; ++b) {
              v[b] = d[m][(4 * group + b) * 4 + 2 * i];
              v[4 + b] = d[m][(4 * group + b) * 4 + 2 * i + 1];
            }
            if (output[m][i] != NO_OUTPUT && column < p.n)
              Epilogue::store(p, output[m][i], column, min(8u, p.n - column), v, inputs[i][group]);
          }
      }
    }
    __syncthreads();  // all have left the window
  }
  stamp_end(p.stamp);
}
