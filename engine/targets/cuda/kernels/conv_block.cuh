// An inverted residual in one launch: a 1×1 convolution, a depthwise one of its result, and a 1×1 convolution of that, of fp16 or bf16
// images in NHWC, for every GPU from Ampere on. What lies between them never leaves the multiprocessor.
//
// A block has a tile of results: IMAGES · TILE_H · TILE_W pixels, and the pixels under them, which it reads once. It goes through the
// expanded channels in panels: expands the pixels to a panel in shared memory, then filters that and adds the panel's share to the results.
// All three are mma.sync: of the filter two taps of eight channels are k, with diagonal matrices of weights (mma/diagonal.cuh), and as
// its sums lie in registers they are, rounded, operand A of the last convolution, whose sums stay there too. Weights of the next panel are
// on their way meanwhile. Beside the image expanded pixels are zeros, not what zeros expand to. Neighbouring tiles expand the pixels
// between them twice.
//
// Results are taken in octets of eight neighbours of a row. A warp has two octets, of EACH rows; those of a row are the 16 rows of a product.
// It goes down the rows of pixels, reads each once, as operand A of two taps, and adds it to all results that it belongs to: taps are two
// neighbours of a row, and where a row has an odd one, that and the one below it. Where a tile has fewer octets than two for each warp,
// several warps share them, each with a part of the channels, and their sums meet in the end (SPLITS).
//
// Sums begin with their biases; `Expanded` and `Filtered` are what is made of them then, but for bounds of what is rounded
// (epilogue/bounded.cuh). Rows in shared memory are an odd number of 16-byte pieces, so that eight of them meet in no bank, and pixels that
// lie STRIDE apart are side by side. `weights` are those of the panels, one behind the other, as they lie in shared memory: w1 in rows of
// X_ROW bytes, w3 of E_ROW, w2 in words of two taps (`Taps`), [PIECES][PANEL][4] and [TAIL][PANEL], and in fp32 the biases of the first two, all
// filled up with zeros.
// NOTES: an infinite expanded value, or one that is no number, meets weights of zero: it turns eight channels to NaN where its window is,
// and in the row of results above that.
#pragma once
#include "epilogue/bounded.cuh"
#include "epilogue/fragment.cuh"
#include "mma/diagonal.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "ptx/pack.cuh"
#include "ptx/shared_pairs.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int KERNEL = config::kernel, STRIDE = config::stride, TAPS = KERNEL * KERNEL, TAP_PAIRS = (TAPS + 1) / 2;
constexpr int IMAGES = config::images, TILE_H = config::tile_h, TILE_W = config::tile_w, EACH = config::each;
constexpr int HALO_H = (TILE_H - 1) * STRIDE + KERNEL, HALO_W = (TILE_W - 1) * STRIDE + KERNEL;
constexpr int PHASE = (HALO_W + STRIDE - 1) / STRIDE, LINE = STRIDE * PHASE;  // pixels of a row that lie STRIDE apart, and all
constexpr bool ODD = KERNEL % 2;  // the last tap of a row has no neighbour
constexpr int LINES = HALO_H + (ODD && IMAGES > 1);  // of an image; zeros where an octet's last rows have a tap below them, of weight zero
constexpr int FRAGMENTS = (IMAGES * LINES * LINE + 15) / 16;
constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int OCTETS_X = (TILE_W + 7) / 8, OCTETS_Y = (TILE_H + EACH - 1) / EACH, OCTETS = IMAGES * OCTETS_Y * OCTETS_X;
constexpr int PAIRS = OCTETS / 2, SPLITS = WARPS / PAIRS;
constexpr int C_IN = config::c_in, PANEL = config::panel, UNIT = config::unit, COLUMNS = config::columns;
constexpr int BLOCKS = (COLUMNS + 31) / 32 * 4, SUMS = 4 * BLOCKS;  // blocks of eight columns: four lanes exchange those of four
constexpr u32 X_ROW = 2 * C_IN + 16, E_ROW = 2 * PANEL + 16;
constexpr int PIECES = TAP_PAIRS / 4, TAIL = TAP_PAIRS % 4;  // of a channel's pairs of taps: 16 bytes each, and the rest
// Where octets reach beyond the tile they read beyond the pixels, up to END: zeros.
constexpr int OCTET_X = TILE_W > 8 ? TILE_W - 8 : 0;  // the last octet's first column: it may have columns in common with the one before
constexpr int LAST_LINE = (IMAGES - 1) * LINES + (EACH * OCTETS_Y - 1) * STRIDE + KERNEL - 1 + ODD;
constexpr int END = LAST_LINE * LINE + (STRIDE - 1) * PHASE + (KERNEL - 1) / STRIDE + OCTET_X + 8;
constexpr int E_ROWS = END > 16 * FRAGMENTS ? END : 16 * FRAGMENTS;
constexpr u32 X_BYTES = 16 * FRAGMENTS * X_ROW, E_BYTES = E_ROWS * E_ROW;
constexpr u32 W1_BYTES = PANEL * X_ROW, W3_BYTES = COLUMNS * E_ROW, W2_BYTES = PANEL * 4 * TAP_PAIRS, BIAS_BYTES = 4 * PANEL;
constexpr u32 W_BYTES = W1_BYTES + W3_BYTES + W2_BYTES + 2 * BIAS_BYTES;
static_assert(OCTETS % 2 == 0 && PAIRS * SPLITS == WARPS && PANEL / 16 % SPLITS == 0 && WARPS % (PANEL / UNIT) == 0, "warps share octets, and units of a panel");
static_assert(C_IN % 16 == 0 && PANEL % UNIT == 0 && UNIT % 16 == 0 && COLUMNS % 8 == 0, "");
constexpr u32 SUM_BYTES = (SPLITS - 1) * PAIRS * EACH * COLUMNS * 64;  // that warps leave to the first of their octets
constexpr u32 PANEL_BYTES = X_BYTES + E_BYTES + 2 * W_BYTES;
static_assert(config::shared_bytes == (SUM_BYTES > PANEL_BYTES ? SUM_BYTES : PANEL_BYTES), "what the host asks for");

DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (same<Element, half>::value) mma_f16_16816(d, a, b0, b1);
  else mma_bf16_16816(d, a, b0, b1);
}

// What FUNCTION makes of two sums, rounded and bounded.
template <class FUNCTION, bool BOUNDED, u32 MOST> DEVICE u32 pair_of(float low, float high) {
  if constexpr (BOUNDED) return bounded_pair<Element, MOST>(FUNCTION::of(low), FUNCTION::of(high));
  else return pack_pair<Element>(FUNCTION::of(low), FUNCTION::of(high));
}

// Where a tile lies: its first image, and its first row and column of results.
struct Tile {
  u32 image, y, x;
  DEVICE explicit Tile(const Params& p) {
    const u32 row = blockIdx.x / p.tiles_x, group = row / p.tiles_y;
    image = group * IMAGES;
    y = (row - group * p.tiles_y) * TILE_H;
    x = (blockIdx.x - row * p.tiles_x) * TILE_W;
  }
  // Whether a pixel under the results, by its place in shared memory, is one of an image, and which.
  DEVICE bool source(const Params& p, u32 place, u32& n, int& row, int& column) const {
    const u32 line = place / LINE, at = place - line * LINE, i = line / LINES, h = line - i * LINES, phase = at / PHASE, across = (at - phase * PHASE) * STRIDE + phase;
    n = image + i;
    row = static_cast<int>(y * STRIDE + h) - p.pad_h;
    column = static_cast<int>(x * STRIDE + across) - p.pad_w;
    return i < IMAGES && h < HALO_H && across < HALO_W && n < p.images && static_cast<u32>(row) < p.in_h && static_cast<u32>(column) < p.in_w;
  }
};

DEVICE void load_pixels(const Params& p, const Tile& tile, u32 to) {
  constexpr u32 PIECES = C_IN / 8;
  for (u32 i = threadIdx.x; i < 16 * FRAGMENTS * PIECES; i += THREADS) {
    const u32 place = i / PIECES, piece = i - place * PIECES;
    u32 n;
    int row, column;
    const bool there = tile.source(p, place, n, row, column) && 8 * piece < p.channels;
    const i64 offset = n * p.x_image + row * p.x_row + column * p.x_pixel + 8 * piece;
    copy_async_16(to + place * X_ROW + 16 * piece, p.x + (there ? offset : 0), there);
  }
}

// Those of a panel lie side by side as they are wanted in shared memory.
DEVICE void load_weights(const Params& p, u32 panel, u32 to) {
  const u8* const from = p.weights + panel * W_BYTES;
  for (u32 i = 16 * threadIdx.x; i < W_BYTES; i += 16 * THREADS) copy_async_16(to + i, from + i, true);
}

// The fragments of pixels that a warp expands, to UNIT columns of the panel, and which of a lane's two rows are pixels of an image.
struct Share {
  static constexpr int STEP = WARPS / (PANEL / UNIT), ROUNDS = (FRAGMENTS + STEP - 1) / STEP;
  u32 first, column, there[(2 * ROUNDS + 31) / 32] = {};
  DEVICE Share(const Params& p, const Tile& tile) : first(threadIdx.x / 32 % STEP), column(threadIdx.x / 32 / STEP * UNIT) {
#pragma unroll
    for (int i = 0; i < 2 * ROUNDS; ++i) {
      u32 n;
      int row, column;
      const u32 place = 16 * (first + i / 2 * STEP) + (threadIdx.x & 31) / 4 + 8 * (i & 1);
      if (tile.source(p, place, n, row, column)) there[i / 32] |= 1u << i % 32;
    }
  }
  DEVICE bool is_there(int round, int row) const { return there[round / 16] >> (2 * round + row) % 32 & 1; }
};

constexpr bool KEEPS_BIASES = UNIT <= 32;  // in registers, of which wider units take too many
DEVICE void load_biases(float2 (&biases)[UNIT / 8], const Share& share, u32 bias) {
#pragma unroll
  for (int j = 0; j < UNIT / 8; ++j) biases[j] = load_shared_8f(bias + 4 * (share.column + 8 * j + 2 * (threadIdx.x & 3)));
}

constexpr int STEPS = C_IN / 16, AHEAD = STEPS < 2 ? STEPS : 2;  // steps of k whose pixels are read before the results of others are stored

DEVICE void load_pixels_of(u32 (&a)[4], u32 x, u32 fragment, int k) {
  const u32 lane = threadIdx.x & 31;
  load_matrix_x4(a, x + (16 * fragment + (lane & 15)) * X_ROW + 16 * (lane >> 4) + 32 * k);
}

// A panel of the pixels. A lane has two neighbouring columns in each block of eight, of two rows; a warp keeps its weights.
DEVICE void expand(const Share& share, u32 x, u32 w1, u32 bias, u32 to) {
  const u32 lane = threadIdx.x & 31;
  u32 ahead[AHEAD][4];
#pragma unroll
  for (int k = 0; k < AHEAD; ++k) load_pixels_of(ahead[k], x, min(share.first, FRAGMENTS - 1u), k);
  u32 w[STEPS][UNIT / 8][2];
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
#pragma unroll
    for (int j = 0; j < UNIT / 8; j += 2) {
      u32 r[4];
      load_matrix_x4(r, w1 + (share.column + 8 * j + (lane & 7) + (lane >> 4) * 8) * X_ROW + 32 * k + 16 * (lane >> 3 & 1));
      w[k][j][0] = r[0]; w[k][j][1] = r[1]; w[k][j + 1][0] = r[2]; w[k][j + 1][1] = r[3];
    }
  float2 biases[UNIT / 8];
  if constexpr (KEEPS_BIASES) load_biases(biases, share, bias);
#pragma unroll
  for (int round = 0; round < Share::ROUNDS; ++round) {
    const u32 fragment = share.first + round * Share::STEP;
    if (FRAGMENTS % Share::STEP != 0 && round == Share::ROUNDS - 1 && fragment >= FRAGMENTS) break;
    if constexpr (!KEEPS_BIASES) load_biases(biases, share, bias);
    float d[UNIT / 8][4];
#pragma unroll
    for (int j = 0; j < UNIT / 8; ++j) {
      d[j][0] = d[j][2] = biases[j].x;
      d[j][1] = d[j][3] = biases[j].y;
    }
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      u32 rest[4];
      if (k >= AHEAD) load_pixels_of(rest, x, fragment, k);
#pragma unroll
      for (int j = 0; j < UNIT / 8; ++j) multiply(d[j], k < AHEAD ? ahead[k < AHEAD ? k : 0] : rest, w[k][j][0], w[k][j][1]);
    }
    if (round + 1 < Share::ROUNDS) {
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) load_pixels_of(ahead[k], x, min(fragment + Share::STEP, FRAGMENTS - 1u), k);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < UNIT / 8; ++j) {
        const u32 word = pair_of<Expanded, config::expanded_bounded, config::expanded_most>(d[j][2 * i], d[j][2 * i + 1]);
        store_shared_4(to + (16 * fragment + lane / 4 + 8 * i) * E_ROW + 2 * (share.column + 8 * j + 2 * (lane & 3)), share.is_there(round, i) ? word : 0);
      }
  }
}

// One of a warp's octets: where it begins in the tile, and the first column that no octet before has.
struct Octet {
  u32 image, y, x, own;
  DEVICE explicit Octet(u32 second) {
    const u32 octet = threadIdx.x / 32 % PAIRS * 2 + second, line = octet / OCTETS_X, column = octet - line * OCTETS_X;
    image = line / OCTETS_Y;
    y = (line - image * OCTETS_Y) * EACH;
    own = 8 * column;
    x = min(own, static_cast<u32>(OCTET_X));
  }
  // Result `lane / 4` of row `row`, as the epilogue counts them, and whether it is there.
  DEVICE bool result(const Params& p, const Tile& tile, u32 row, u32& place) const {
    const u32 h = y + row, w = x + (threadIdx.x & 31) / 4, n = tile.image + image, out_y = tile.y + h, out_x = tile.x + w;
    place = (n * p.out_h + out_y) * p.out_w + out_x;
    return h < TILE_H && w >= own && w < TILE_W && n < p.images && out_y < p.out_h && out_x < p.out_w;
  }
};

// Where this lane finds its pixel of operand A: of lanes 0 to 7 of the first octet under the first of two taps, 8 to 15 of the second
// octet, the others under the second tap. Taps 2j and 2j + 1 of a row, and the last tap of a row and of the next.
struct Under {
  static constexpr int ROWS = (EACH - 1) * STRIDE + KERNEL;
  u32 across[KERNEL / 2 + 1], down;
  DEVICE explicit Under(u32 lane) {
    const Octet octet(lane >> 3 & 1);
    const u32 first = (octet.image * LINES + octet.y * STRIDE) * LINE + octet.x + (lane & 7), second = lane >> 4;
#pragma unroll
    for (int j = 0; j < KERNEL / 2; ++j) {
      const u32 tap = 2 * j + second;
      across[j] = (first + tap % STRIDE * PHASE + tap / STRIDE) * E_ROW;
    }
    down = (first + second * LINE + (KERNEL - 1) % STRIDE * PHASE + (KERNEL - 1) / STRIDE) * E_ROW;
  }
};

// The taps of eight channels, a lane those of one, which become operands as they are used: diagonal matrices. Words are the pairs of every
// row, then those of the last column, two rows each.
struct Taps {
  u32 words[TAP_PAIRS];
  DEVICE Taps(u32 taps, u32 channel) {
    channel += (threadIdx.x & 31) / 4;
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const uint4 v = load_shared_16(taps + 16 * (i * PANEL + channel));
      words[4 * i] = v.x; words[4 * i + 1] = v.y; words[4 * i + 2] = v.z; words[4 * i + 3] = v.w;
    }
#pragma unroll
    for (int i = 0; i < TAIL; ++i) words[4 * PIECES + i] = load_shared_4(taps + 16 * PIECES * PANEL + 4 * (i * PANEL + channel));
  }
  // Those of row `row` as operands of pair j of its taps.
  DEVICE void multiply_pair(float (&d)[4], const u32 (&a)[4], int row, int j, const DiagonalPlace& place) const {
    const u32 word = words[row * (KERNEL / 2) + j];
    multiply(d, a, permute_bytes(word, place.low), permute_bytes(word, place.high));
  }
  // Those of the last column, of rows `row` and `row` + 1, zeros where there is none.
  DEVICE void multiply_last(float (&d)[4], const u32 (&a)[4], int row, const DiagonalPlace& place) const {
    multiply(d, a, last(row, place), last(row + 1, place));
  }
  DEVICE u32 last(int row, const DiagonalPlace& place) const {
    if (row < 0 || row >= KERNEL) return 0;
    return permute_bytes(words[KERNEL * (KERNEL / 2) + row / 2], row % 2 ? place.high : place.low);
  }
};

// The filter of the eight channels from `e` on, of all rows of the octets, as halves of operand A of the last convolution.
DEVICE void filter(u32 (&a)[EACH][4], int half, const Under& under, u32 e, const Taps& taps, float2 bias, const DiagonalPlace& diagonal) {
  float d[EACH][4];
#pragma unroll
  for (int o = 0; o < EACH; ++o) {
    d[o][0] = d[o][2] = bias.x;
    d[o][1] = d[o][3] = bias.y;
  }
#pragma unroll
  for (int row = 0; row < Under::ROWS; ++row) {
    u32 pixels[KERNEL / 2 + 1][4];
#pragma unroll
    for (int j = 0; j < KERNEL / 2; ++j) load_matrix_x4(pixels[j], e + under.across[j] + row * LINE * E_ROW);
    if (ODD && row % 2 == 0) load_matrix_x4(pixels[KERNEL / 2], e + under.down + row * LINE * E_ROW);
#pragma unroll
    for (int j = 0; j < KERNEL / 2; ++j)
#pragma unroll
      for (int o = 0; o < EACH; ++o)
        if (row >= o * STRIDE && row < o * STRIDE + KERNEL) taps.multiply_pair(d[o], pixels[j], row - o * STRIDE, j, diagonal);
    if (ODD && row % 2 == 0) {
#pragma unroll
      for (int o = 0; o < EACH; ++o)
        if (row + 1 >= o * STRIDE && row < o * STRIDE + KERNEL) taps.multiply_last(d[o], pixels[KERNEL / 2], row - o * STRIDE, diagonal);
    }
#pragma unroll
    for (int o = 0; o < EACH; ++o) {
      if (o * STRIDE + KERNEL - 1 != row) continue;  // the last one that it belongs to
#pragma unroll
      for (int i = 0; i < 2; ++i)
        a[o][2 * half + i] = pair_of<Filtered, config::filtered_bounded, config::filtered_most>(d[o][2 * i], d[o][2 * i + 1]);
    }
  }
}

// Filters a warp's channels of a panel, which has `channels`, or more, and adds their share to the results.
DEVICE void filter_and_project(float (&sums)[EACH][SUMS], const Under& under, const DiagonalPlace& diagonal, u32 split, u32 e, u32 weights,
                               u32 channels) {
  const u32 lane = threadIdx.x & 31, w2 = weights + W1_BYTES + W3_BYTES, bias = w2 + W2_BYTES + BIAS_BYTES;
  const u32 w3 = weights + W1_BYTES + ((lane & 7) + (lane >> 4) * 8) * E_ROW + 16 * (lane >> 3 & 1);
#pragma unroll
  for (int turn = 0; turn < PANEL / 16 / SPLITS; ++turn) {
    const u32 group = turn * SPLITS + split;
    if (16 * group >= channels) break;
    u32 a[EACH][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 channel = 16 * group + 8 * half;
      filter(a, half, under, e + 2 * channel, {w2, channel}, load_shared_8f(bias + 4 * (channel + 2 * (lane & 3))), diagonal);
    }
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j += 2) {
      u32 w[4];
      load_matrix_x4(w, w3 + 8 * j * E_ROW + 32 * group);
#pragma unroll
      for (int o = 0; o < EACH; ++o) {
        multiply(reinterpret_cast<float (&)[4]>(sums[o][4 * j]), a[o], w[0], w[1]);
        // Of an odd last block of columns the other half is the taps behind it.
        if (j + 1 < COLUMNS / 8) multiply(reinterpret_cast<float (&)[4]>(sums[o][4 * j + 4]), a[o], w[2], w[3]);
      }
    }
  }
}

// The sums of warps that share octets, added up by the first of them.
DEVICE void add_splits(float (&sums)[EACH][SUMS], u32 split, u32 shared) {
  const u32 own = shared + (threadIdx.x % (32 * PAIRS)) * 16;
  constexpr u32 EVERY = 32 * PAIRS * 16, PARTS = EACH * COLUMNS / 8;
  __syncthreads();  // all are through with the last panel
#pragma unroll
  for (int i = 0; i < PARTS; ++i) {
    float* const d = &sums[i / (COLUMNS / 8)][4 * (i % (COLUMNS / 8))];
    if (split > 0) store_shared_16(own + ((split - 1) * PARTS + i) * EVERY, make_float4(d[0], d[1], d[2], d[3]));
  }
  __syncthreads();
  if (split > 0) return;
#pragma unroll
  for (int other = 0; other < SPLITS - 1; ++other)
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      float* const d = &sums[i / (COLUMNS / 8)][4 * (i % (COLUMNS / 8))];
      const uint4 v = load_shared_16(own + (other * PARTS + i) * EVERY);
      d[0] += __uint_as_float(v.x); d[1] += __uint_as_float(v.y); d[2] += __uint_as_float(v.z); d[3] += __uint_as_float(v.w);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 x = shared_address(shared), e = x + X_BYTES, weights = e + E_BYTES;
  const Tile tile(p);
  let_next_kernel_start();
  load_weights(p, 0, weights);  // constants: no kernel before this one writes them
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  load_pixels(p, tile, x);
  copy_async_commit();

  for (u32 i = 16 * (FRAGMENTS * E_ROW + threadIdx.x); i < E_BYTES; i += 16 * THREADS) store_shared_16(e + i, make_uint4(0, 0, 0, 0));

  const Share share(p, tile);
  const u32 split = threadIdx.x / 32 / PAIRS;
  const Under under(threadIdx.x & 31);
  const DiagonalPlace diagonal(threadIdx.x & 31);
  float sums[EACH][SUMS] = {};
  for (u32 panel = 0; panel < p.panels; ++panel) {
    const u32 own = weights + (panel & 1) * W_BYTES;
    copy_async_wait<0>();
    __syncthreads();  // the panel's weights have come, and all are through with the panel before
    if (panel + 1 < p.panels) load_weights(p, panel + 1, weights + (panel + 1 & 1) * W_BYTES);
    copy_async_commit();
    expand(share, x, own, own + W1_BYTES + W3_BYTES + W2_BYTES, e);
    __syncthreads();
    filter_and_project(sums, under, diagonal, split, e, own, p.expanded - panel * PANEL);
  }
  if constexpr (SPLITS > 1) add_splits(sums, split, x);
  if (split == 0) {
    const Octet octets[2] = {Octet(0), Octet(1)};
#pragma unroll
    for (int o = 0; o < EACH; ++o) {
      u32 places[2];
      bool stored[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) stored[i] = octets[i].result(p, tile, o, places[i]);
      emit_rows<Epilogue, BLOCKS, 2>(p, sums[o], places, stored, 0, p.outputs);
    }
  }
  stamp_end(p.stamp);
}
