// An inverted residual in one launch: a 1×1 convolution, a depthwise one of its result, and a 1×1 convolution of that, of fp16 or bf16
// images in NHWC, for every GPU from Ampere on. What lies between them never leaves the multiprocessor.
//
// A block has a tile of results: IMAGES · TILE_H · TILE_W pixels, and the pixels under them, which it reads once (HALO). It goes through the
// expanded channels in panels: expands the halo to a panel (mma.sync), filters that (fp32, on the ordinary units), and adds the panel's
// share to the results (mma.sync), whose sums stay in registers. Beside the image expanded pixels are zeros, not what zeros expand to.
// Weights of the next panel are on their way meanwhile. Neighbouring tiles expand the pixels between them twice.
//
// Sums begin with their biases; `Expanded` and `Filtered` are what is made of them then, but for bounds of what is rounded
// (epilogue/bounded.cuh). Rows in shared memory are an odd number of 16-byte pieces, so that eight of them meet in no bank.
// w1 is packed [panels · PANEL][C_IN], w3 [COLUMNS][panels · PANEL], and in fp32 the biases of both and w2 [taps][panels][2][PANEL / 8][4],
// the first four of every eight channels and then the others, all filled up with zeros.
#pragma once
#include "epilogue/bounded.cuh"
#include "epilogue/fragment.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "ptx/pack.cuh"
#include "ptx/shared_pairs.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int KERNEL = config::kernel, STRIDE = config::stride, TAPS = KERNEL * KERNEL, STRIP = config::strip;
constexpr int IMAGES = config::images, TILE_H = config::tile_h, TILE_W = config::tile_w, OUT = IMAGES * TILE_H * TILE_W;
constexpr int HALO_H = (TILE_H - 1) * STRIDE + KERNEL, HALO_W = (TILE_W - 1) * STRIDE + KERNEL, HALO = IMAGES * HALO_H * HALO_W;
constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 16 * WARPS;  // results of a tile, a warp has 16 of them
constexpr int C_IN = config::c_in, PANEL = config::panel, BLOCKS = config::n_blocks, COLUMNS = 8 * BLOCKS;
constexpr int FRAGMENTS = (HALO + 15) / 16;
constexpr u32 X_ROW = 2 * C_IN + 16, E_ROW = 2 * PANEL + 16;
constexpr int UNIT = PANEL % 32 == 0 ? 32 : 16, UNITS = PANEL / UNIT;  // columns that a warp expands at once
constexpr u32 X_BYTES = 16 * FRAGMENTS * X_ROW, E_BYTES = 16 * FRAGMENTS * E_ROW, D_BYTES = ROWS * E_ROW;
constexpr u32 TAP_ROW = 4 * PANEL, W1_BYTES = PANEL * X_ROW, W3_BYTES = COLUMNS * E_ROW, W2_BYTES = (TAPS + 2) * TAP_ROW;
constexpr u32 W_BYTES = W1_BYTES + W3_BYTES + W2_BYTES;
static_assert(OUT <= ROWS && C_IN % 16 == 0 && PANEL % 16 == 0 && BLOCKS % 4 == 0 && TILE_W % STRIP == 0, "");
static_assert(X_BYTES + E_BYTES + D_BYTES + 2 * W_BYTES == config::shared_bytes, "what the host asks for");

DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (same<Element, half>::value) mma_f16_16816(d, a, b0, b1);
  else mma_bf16_16816(d, a, b0, b1);
}

// d (16 × 32 of a warp) += rows of a · rows of b, K of both; both in rows of ROW bytes.
template <int K, u32 ROW_A, u32 ROW_B, int N> DEVICE void multiply_rows(float (&d)[N], u32 a, u32 b) {
  const u32 lane = threadIdx.x & 31;
  const u32 own_a = a + (lane & 15) * ROW_A + 16 * (lane >> 4), own_b = b + ((lane & 7) + (lane >> 4) * 8) * ROW_B + 16 * (lane >> 3 & 1);
#pragma unroll
  for (int k = 0; k < K / 16; ++k) {
    u32 x[4];
    load_matrix_x4(x, own_a + 32 * k);
#pragma unroll
    for (int j = 0; j < N / 4; j += 2) {
      u32 w[4];
      load_matrix_x4(w, own_b + 8 * j * ROW_B + 32 * k);
      multiply(reinterpret_cast<float (&)[4]>(d[4 * j]), x, w[0], w[1]);
      multiply(reinterpret_cast<float (&)[4]>(d[4 * j + 4]), x, w[2], w[3]);
    }
  }
}

// What FUNCTION makes of two sums, rounded and bounded.
template <class FUNCTION, bool BOUNDED, u32 MOST> DEVICE u32 pair_of(float low, float high) {
  if constexpr (BOUNDED) return bounded_pair<Element, MOST>(FUNCTION::of(low), FUNCTION::of(high));
  else return pack_pair<Element>(FUNCTION::of(low), FUNCTION::of(high));
}
DEVICE void widened(uint4 words, float (&v)[8]) {
  const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = to_float(Element{static_cast<u16>(w[i])});
    v[2 * i + 1] = to_float(Element{static_cast<u16>(w[i] >> 16)});
  }
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
  // Whether a pixel of the halo is one of an image, and which.
  DEVICE bool source(const Params& p, u32 pixel, u32& n, int& row, int& column) const {
    const u32 i = pixel / (HALO_H * HALO_W), within = pixel - i * (HALO_H * HALO_W), h = within / HALO_W;
    n = image + i;
    row = static_cast<int>(y * STRIDE + h) - p.pad_h;
    column = static_cast<int>(x * STRIDE + (within - h * HALO_W)) - p.pad_w;
    return pixel < HALO && n < p.images && row >= 0 && row < static_cast<int>(p.in_h) && column >= 0 && column < static_cast<int>(p.in_w);
  }
  // The same of a pixel of results, as the epilogue counts them.
  DEVICE bool result(const Params& p, u32 pixel, u32& place) const {
    const u32 i = pixel / (TILE_H * TILE_W), within = pixel - i * (TILE_H * TILE_W), h = within / TILE_W;
    const u32 n = image + i, row = y + h, column = x + (within - h * TILE_W);
    place = (n * p.out_h + row) * p.out_w + column;
    return pixel < OUT && n < p.images && row < p.out_h && column < p.out_w;
  }
};

DEVICE void load_halo(const Params& p, const Tile& tile, u32 to) {
  constexpr u32 PIECES = C_IN / 8;
  for (u32 i = threadIdx.x; i < 16 * FRAGMENTS * PIECES; i += THREADS) {
    const u32 pixel = i / PIECES, piece = i - pixel * PIECES;
    u32 n;
    int row, column;
    const bool there = tile.source(p, pixel, n, row, column) && 8 * piece < p.channels;
    const i64 offset = n * p.x_image + row * p.x_row + column * p.x_pixel + 8 * piece;
    copy_async_16(to + pixel * X_ROW + 16 * piece, p.x + (there ? offset : 0), there);
  }
}

// `rows` of BYTES, which lie `stride` elements apart, to rows of ROW bytes.
template <u32 ROW, u32 BYTES, class T> DEVICE void load_rows(u32 to, const T* from, u32 rows, u32 stride) {
  constexpr u32 PIECES = BYTES / 16;
  for (u32 i = threadIdx.x; i < rows * PIECES; i += THREADS) {
    const u32 row = i / PIECES, piece = i - row * PIECES;
    copy_async_16(to + row * ROW + 16 * piece, from + row * stride + 16 / sizeof(T) * piece, true);
  }
}
DEVICE void load_weights(const Params& p, u32 panel, u32 to) {
  const u32 all = p.panels * PANEL;
  load_rows<X_ROW, 2 * C_IN>(to, p.w1 + panel * PANEL * C_IN, PANEL, C_IN);
  load_rows<E_ROW, 2 * PANEL>(to + W1_BYTES, p.w3 + panel * PANEL, COLUMNS, all);
  const u32 taps = to + W1_BYTES + W3_BYTES;
  load_rows<TAP_ROW, TAP_ROW>(taps, p.w2 + panel * PANEL, TAPS, all);
  load_rows<TAP_ROW, TAP_ROW>(taps + TAPS * TAP_ROW, p.expanded_bias + panel * PANEL, 1, all);
  load_rows<TAP_ROW, TAP_ROW>(taps + (TAPS + 1) * TAP_ROW, p.filtered_bias + panel * PANEL, 1, all);
}

DEVICE float4 load_four(u32 address) {
  const uint4 v = load_shared_16(address);
  return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

// A panel of the expanded halo. A lane has two neighbouring columns in each block of eight, of two rows.
DEVICE void expand(const Params& p, const Tile& tile, u32 x, u32 w1, u32 bias, u32 to) {
  const u32 lane = threadIdx.x & 31;
  for (u32 unit = threadIdx.x / 32; unit < FRAGMENTS * UNITS; unit += WARPS) {
    const u32 fragment = unit / UNITS, first = (unit - fragment * UNITS) * UNIT + 2 * (lane & 3);
    float d[UNIT / 2];
#pragma unroll
    for (int j = 0; j < UNIT / 8; ++j) {
      const float2 two = load_shared_8f(bias + 4 * (first + 8 * j));
      d[4 * j] = d[4 * j + 2] = two.x;
      d[4 * j + 1] = d[4 * j + 3] = two.y;
    }
    multiply_rows<C_IN, X_ROW, X_ROW>(d, x + 16 * fragment * X_ROW, w1 + (first - 2 * (lane & 3)) * X_ROW);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 pixel = 16 * fragment + lane / 4 + 8 * i;
      u32 n;
      int row, column;
      const bool there = tile.source(p, pixel, n, row, column);
#pragma unroll
      for (int j = 0; j < UNIT / 8; ++j) {
        const u32 word = pair_of<Expanded, config::expanded_bounded, config::expanded_most>(d[4 * j + 2 * i], d[4 * j + 2 * i + 1]);
        store_shared_4(to + pixel * E_ROW + 2 * (first + 8 * j), there ? word : 0);
      }
    }
  }
}

// The same filtered: a thread has eight channels of STRIP neighbouring results at a time.
DEVICE void filter(u32 e, u32 w2, u32 to) {
  constexpr u32 VECTORS = PANEL / 8, STRIPS = OUT / STRIP, TOGETHER = THREADS / VECTORS, WINDOW = (STRIP - 1) * STRIDE + KERNEL;
  const u32 own = threadIdx.x / VECTORS, vector = threadIdx.x - own * VECTORS, bias = w2 + (TAPS + 1) * TAP_ROW + 32 * vector;
  for (u32 strip = own < TOGETHER ? own : STRIPS; strip < STRIPS; strip += TOGETHER) {
    const u32 line = strip / (TILE_W / STRIP), x = (strip - line * (TILE_W / STRIP)) * STRIP, i = line / TILE_H, y = line - i * TILE_H;
    const u32 first = e + ((i * HALO_H + y * STRIDE) * HALO_W + x * STRIDE) * E_ROW + 16 * vector;
    float sums[STRIP][8];
    const float4 low = load_four(bias), high = load_four(bias + 16);
#pragma unroll
    for (int s = 0; s < STRIP; ++s) {
      sums[s][0] = low.x; sums[s][1] = low.y; sums[s][2] = low.z; sums[s][3] = low.w;
      sums[s][4] = high.x; sums[s][5] = high.y; sums[s][6] = high.z; sums[s][7] = high.w;
    }
#pragma unroll
    for (int r = 0; r < KERNEL; ++r) {
      float w[KERNEL][8];
#pragma unroll
      for (int c = 0; c < KERNEL; ++c) {
        const u32 tap = w2 + (r * KERNEL + c) * TAP_ROW + 16 * vector;
        const float4 a = load_four(tap), b = load_four(tap + TAP_ROW / 2);
        w[c][0] = a.x; w[c][1] = a.y; w[c][2] = a.z; w[c][3] = a.w;
        w[c][4] = b.x; w[c][5] = b.y; w[c][6] = b.z; w[c][7] = b.w;
      }
#pragma unroll
      for (int at = 0; at < WINDOW; ++at) {
        float v[8];
        widened(load_shared_16(first + (r * HALO_W + at) * E_ROW), v);
#pragma unroll
        for (int s = 0; s < STRIP; ++s) {
          const int c = at - s * STRIDE;
          if (c < 0 || c >= KERNEL) continue;
#pragma unroll
          for (int j = 0; j < 8; ++j) sums[s][j] = fmaf(v[j], w[c][j], sums[s][j]);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < STRIP; ++s) {
      u32 words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) words[j] = pair_of<Filtered, config::filtered_bounded, config::filtered_most>(sums[s][2 * j], sums[s][2 * j + 1]);
      store_shared_16(to + (line * TILE_W + x + s) * E_ROW + 16 * vector, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 x = shared_address(shared), e = x + X_BYTES, d = e + E_BYTES, weights = d + D_BYTES;
  const u32 lane = threadIdx.x & 31, row0 = threadIdx.x / 32 * 16;
  const Tile tile(p);
  let_next_kernel_start();
  load_weights(p, 0, weights);  // constants: no kernel before this one writes them
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  load_halo(p, tile, x);
  copy_async_commit();

  float sums[4 * BLOCKS] = {};
  for (u32 panel = 0; panel < p.panels; ++panel) {
    const u32 own = weights + (panel & 1) * W_BYTES;
    __syncthreads();  // all are through with the panel before
    if (panel + 1 < p.panels) load_weights(p, panel + 1, weights + (panel + 1 & 1) * W_BYTES);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    expand(p, tile, x, own, own + W1_BYTES + W3_BYTES + TAPS * TAP_ROW, e);
    __syncthreads();
    filter(e, own + W1_BYTES + W3_BYTES, d);
    __syncthreads();
    if (row0 < OUT) multiply_rows<PANEL, E_ROW, E_ROW>(sums, d + row0 * E_ROW, own + W1_BYTES);
  }
  u32 places[2];
  bool stored[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) stored[i] = tile.result(p, row0 + lane / 4 + 8 * i, places[i]);
  if (row0 < OUT) emit_rows<Epilogue, BLOCKS, 2>(p, sums, places, stored, 0, p.outputs);
  stamp_end(p.stamp);
}
