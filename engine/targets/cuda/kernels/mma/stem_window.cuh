// The window of input under a tile of output pixels of an image with few channels: how it comes to shared memory, and where the pairs of
// neighbouring elements lie in it that operand A of a product is made of. Included by conv_stem.cuh, which says what it is for, and
// conv_stem_wgmma.cuh.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/fragment.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
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
constexpr int BLOCKS = config::n_blocks, COLUMNS = 8 * BLOCKS, THREADS = 32 * config::warps;
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

// Brings the window of a tile, a warp a row and a lane two pixels, of narrow windows several rows at once; what lies outside the image
// becomes zero.
DEVICE void load_window(const Params& p, const Tile& tile, u32 window) {
  constexpr int ROW_ITEMS = WINDOW_W / 2, PASSES = (ROW_ITEMS + 31) / 32, AHEAD = PASSES < 4 ? PASSES : 4, AT_ONCE = 4 / AHEAD;
  const u32 lane = threadIdx.x & 31;
  const i64 pixel_step = config::pixel_step ? config::pixel_step : p.x_pixel, channel_step = config::channel_step ? config::channel_step : p.x_channel;
  const int y0 = static_cast<int>(tile.y * STRIDE_H) - p.pad_h, x0 = static_cast<int>(tile.x * STRIDE_W) - p.pad_w;
  const Image* image = p.x + tile.image * p.x_image;
#pragma unroll 1
  for (u32 first_row = threadIdx.x / 32; first_row < WINDOW_H; first_row += AT_ONCE * config::warps) {
#pragma unroll 1
    for (int first = 0; first < PASSES; first += AHEAD) {
      const int pair = 32 * first + lane, x = x0 + 2 * pair;
      Image value[AT_ONCE][AHEAD][2][CHANNELS] = {};
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const u32 row = first_row + j * config::warps;
        const int y = y0 + static_cast<int>(row);
        const bool row_inside = row < WINDOW_H && static_cast<u32>(y) < p.in_h;
        const Image* pixel = image + y * p.x_row + x * pixel_step;
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (row_inside && static_cast<u32>(x + 64 * a + i) < p.in_w && pair + 32 * a < ROW_ITEMS) {
#pragma unroll
              for (int c = 0; c < CHANNELS; ++c) value[j][a][i][c] = pixel[(64 * a + i) * pixel_step + c * channel_step];
            }
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const u32 row = first_row + j * config::warps;
#pragma unroll
        for (int a = 0; a < AHEAD; ++a)
          if (row < WINDOW_H && pair + 32 * a < ROW_ITEMS) store_pixels(window + row * ROW_BYTES + (pair + 32 * a) * (4 * PADDED), value[j][a]);
      }
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

// The pair offsets of a lane, where they are no constants.
struct PairTable {
  u32 offset[config::regular ? 1 : 2 * STEPS];
  DEVICE explicit PairTable(u32 quad) {
    if constexpr (!config::regular) {
#pragma unroll
      for (int i = 0; i < 2 * STEPS; ++i) offset[i] = pair_offset(i, quad);
    }
  }
  DEVICE u32 operator[](int i) const {
    if constexpr (config::regular) return pair_offset(i, 0);
    else return offset[i];
  }
};

// A lane's two pixels of a fragment, neighbours in two units of eight: where they lie in the window, and which outputs they are. A unit past
// the end is computed from the last one.
struct FragmentPixels {
  u32 source[2], output[2];
  DEVICE FragmentPixels(const Params& p, const Tile& tile, u32 window, u32 first_unit) {
    const u32 lane = threadIdx.x & 31;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 named = first_unit + i, unit = min(named, static_cast<u32>(ROWS * UNITS - 1));
      const u32 row = unit / UNITS, column = (unit - row * UNITS) * 8 + lane / 4, y = tile.y + row, x = tile.x + column;
      source[i] = window + row * (STRIDE_H * ROW_BYTES) + column * PIXEL_BYTES + (config::regular ? 4 * (lane & 3) : 0);
      output[i] = named == unit && y < p.out_h && x < p.out_w ? (tile.image * p.out_h + y) * p.out_w + x : NO_OUTPUT;
    }
  }
};

// Operand A of a step.
DEVICE void load_pairs(u32 (&a)[4], const u32 (&source)[2], u32 low, u32 high) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    a[i] = load_shared_4(source[i] + low);
    a[2 + i] = load_shared_4(source[i] + high);
  }
}

// Stores the results of a fragment, whose columns are interleaved: a lane has eight neighbouring ones of every 32.
DEVICE void store_fragment(const Params& p, const float (&d)[4 * BLOCKS], const u32 (&output)[2], u32 column0) {
  const u32 quad = threadIdx.x & 3;
  // What is not stored is fetched from row or column 0: a load that always happens needs no merging.
  Epilogue::Inputs inputs[2][BLOCKS / 4];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int group = 0; group < BLOCKS / 4; ++group) {
      const u32 named = column0 + 32 * group + 8 * quad, column = named < p.n ? named : 0;
      inputs[i][group] = Epilogue::fetch(p, output[i] != NO_OUTPUT ? output[i] : 0, column, min(8u, p.n - column));
    }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int group = 0; group < BLOCKS / 4; ++group) {
      const u32 column = column0 + 32 * group + 8 * quad;
      float v[8];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        v[b] = d[(4 * group + b) * 4 + 2 * i];
        v[4 + b] = d[(4 * group + b) * 4 + 2 * i + 1];
      }
      if (output[i] != NO_OUTPUT && column < p.n) Epilogue::store(p, output[i], column, min(8u, p.n - column), v, inputs[i][group]);
    }
}

// Asks for the packed weights of a slab of columns, constants that no kernel before this one writes.
DEVICE void load_weights(const Params& p, u32 weights) {
  const Element* w = p.w + blockIdx.y * (W_BYTES / sizeof(Element));
  for (u32 i = threadIdx.x; i < W_CHUNKS; i += THREADS) copy_async_16(weights + 16 * i, w + 8 * i, true);
  copy_async_commit();
}
