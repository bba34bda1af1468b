// Depthwise convolution of fp16 or bf16 images in NHWC on mma.sync. A matrix instruction is given 16 pixels, two taps of 8 channels as
// k, and the taps' weights as two diagonal matrices: seven of eight of its products are with zero, and still it costs less than the
// conversions and additions of the ordinary units, so that memory is what bounds. Sums in fp32.
//
// A block keeps its channels (GROUPS of eight) and goes through tiles of output pixels. The window of the next tile comes to shared
// memory by cp.async while this one is computed: cells of 16 bytes (8 channels of a pixel), a line of them for a row and a group, pixels
// that lie STRIDE_W apart side by side, so that eight rows of a fragment never meet in a bank. Pixels come in units of eight neighbours
// of a row; a warp takes two units of ROWS output rows and two groups. It goes down the rows of inputs and adds each to all outputs that
// it belongs to: an input is read from shared memory once for every pair of horizontal taps. Rows outside the image are neither brought
// nor computed.
//
// w is packed [channel][WORDS], words of two horizontal taps. NOTES: an infinite input meets weights of zero, so it turns the other
// seven channels of its group to NaN where its window is.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/fragment.cuh"
#include "mma/tile.cuh"
#include "ptx/grid.cuh"
#include "ptx/permute.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int KERNEL_H = config::kernel_h, STRIDE_H = config::stride_h, DILATION_H = config::dilation_h;
constexpr int KERNEL_W = config::kernel_w, STRIDE_W = config::stride_w, DILATION_W = config::dilation_w;
constexpr int ROWS = config::rows, BANDS = config::bands, UNITS = config::units, IMAGES = config::images;  // the tile
constexpr int TILE_H = ROWS * BANDS, TILE_W = 8 * UNITS, TILE_UNITS = IMAGES * UNITS, UNIT_PAIRS = (TILE_UNITS + 1) / 2;
constexpr int GROUP_PAIRS = config::group_pairs, GROUPS = 2 * GROUP_PAIRS, WARPS = config::warps, THREADS = 32 * WARPS;
constexpr int WINDOW_H = (TILE_H - 1) * STRIDE_H + (KERNEL_H - 1) * DILATION_H + 1;
constexpr int WINDOW_W = (TILE_W - 1) * STRIDE_W + (KERNEL_W - 1) * DILATION_W + 1;
constexpr int PHASE_CELLS = config::phase_cells, LINE_BYTES = 16 * STRIDE_W * PHASE_CELLS, ROW_BYTES = GROUPS * LINE_BYTES;
constexpr int STAGES = config::stages, STAGE_BYTES = IMAGES * WINDOW_H * ROW_BYTES;
constexpr int TAP_PAIRS = (KERNEL_W + 1) / 2, WORDS = (KERNEL_H * TAP_PAIRS + 3) / 4 * 4;
static_assert(STAGES * STAGE_BYTES == config::shared_bytes, "the host asks for the windows");
static_assert(PHASE_CELLS * STRIDE_W >= WINDOW_W, "a line holds the window's pixels");
static_assert(WARPS % GROUP_PAIRS == 0, "a warp keeps its channels");
constexpr u32 NO_OUTPUT = ~0u;

// Where pixel x of a line lies, in bytes.
DEVICE constexpr u32 cell(u32 x) { return 16 * (x % STRIDE_W * PHASE_CELLS + x / STRIDE_W); }

struct Tile { u32 image, y, x; };  // its first image and output pixel

DEVICE Tile tile_of(const Params& p, u32 index) {
  const u32 across = (p.out_w + TILE_W - 1) / TILE_W, down = (p.out_h + TILE_H - 1) / TILE_H, line = index / across, image = line / down;
  return {image * IMAGES, (line - image * down) * TILE_H, (index - line * across) * TILE_W};
}

// Brings a window: a warp a row. What lies beside the image becomes zero.
DEVICE void copy_window(const Params& p, const Tile& tile, u32 channel0, u32 stage) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const int y0 = static_cast<int>(tile.y * STRIDE_H) - p.pad_h, x0 = static_cast<int>(tile.x * STRIDE_W) - p.pad_w;
#pragma unroll 1
  for (u32 line = warp; line < IMAGES * WINDOW_H; line += WARPS) {
    const u32 image = line / WINDOW_H;
    const int y = y0 + static_cast<int>(line - image * WINDOW_H);
    if (tile.image + image >= p.images || static_cast<u32>(y) >= p.in_h) continue;
    const Element* row = p.x + (tile.image + image) * p.x_image + y * p.x_row + channel0;
#pragma unroll 4
    for (u32 i = lane; i < WINDOW_W * GROUPS; i += 32) {
      const u32 pixel = i / GROUPS, group = i - pixel * GROUPS;
      const int x = x0 + static_cast<int>(pixel);
      const bool inside = static_cast<u32>(x) < p.in_w && channel0 + 8 * group < p.channels;
      copy_async_16(stage + line * ROW_BYTES + group * LINE_BYTES + cell(pixel), row + x * p.x_pixel + 8 * group, inside);
    }
  }
}

// The diagonal matrices of two horizontal taps as operand B: this lane's weight stands in one of its four halves or none.
struct Diagonal {
  u32 low, high;  // selectors of bytes
  DEVICE explicit Diagonal(u32 lane) {
    const u32 column = lane / 4;
    const bool mine = column / 2 == (lane & 3), odd = column & 1;
    low = !mine ? 0x4444u : odd ? 0x1044u : 0x4410u;
    high = !mine ? 0x4444u : odd ? 0x3244u : 0x4432u;
  }
};

// The weights of one group of channels, as words of taps or (EXPANDED) as operands.
template <bool EXPANDED> struct Weights {
  u32 word[EXPANDED ? 2 * WORDS : WORDS];
  DEVICE void load(const Element* w, const Diagonal& diagonal) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(w)[i];
      const u32 taps[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (EXPANDED) {
          word[2 * (4 * i + j)] = permute_bytes(taps[j], diagonal.low);
          word[2 * (4 * i + j) + 1] = permute_bytes(taps[j], diagonal.high);
        } else {
          word[4 * i + j] = taps[j];
        }
      }
    }
  }
  DEVICE void multiply(float (&d)[4], const u32 (&a)[4], int i, const Diagonal& diagonal) const {
    const u32 b0 = EXPANDED ? word[EXPANDED ? 2 * i : 0] : permute_bytes(word[EXPANDED ? 0 : i], diagonal.low);
    const u32 b1 = EXPANDED ? word[EXPANDED ? 2 * i + 1 : 0] : permute_bytes(word[EXPANDED ? 0 : i], diagonal.high);
    if constexpr (same<Element, half>::value) mma_f16_16816(d, a, b0, b1);
    else mma_bf16_16816(d, a, b0, b1);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 ring = shared_address(shared), lane = threadIdx.x & 31, warp = threadIdx.x / 32, quad = lane & 3;
  const u32 channel0 = blockIdx.x * (8 * GROUPS), group0 = warp % GROUP_PAIRS * 2;
  let_next_kernel_start();
  const Diagonal diagonal(lane);
  Weights<config::expanded> weights[2];
  // Filters are constants: no kernel before this one writes them.
#pragma unroll
  for (int g = 0; g < 2; ++g) weights[g].load(p.w + (channel0 + 8 * (group0 + g) + lane / 4) * (2 * WORDS), diagonal);
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  // Lanes 0–7 name the cells of the first unit under the first tap, 8–15 of the second unit, the others of both under the second tap.
  const u32 half = lane >> 3 & 1;
  u32 tap_offset[TAP_PAIRS];
#pragma unroll
  for (int j = 0; j < TAP_PAIRS; ++j) {
    const u32 second = cell((2 * j + 1 < KERNEL_W ? 2 * j + 1 : 2 * j) * DILATION_W);  // an odd last tap has a partner of weight zero
    tap_offset[j] = lane >> 4 ? second : cell(2 * j * DILATION_W);
  }

  u32 index = blockIdx.y;
  if (index < p.tiles) copy_window(p, tile_of(p, index), channel0, ring);
  copy_async_commit();
  for (u32 turn = 0; index < p.tiles; ++turn, index += gridDim.y) {
    const u32 stage = ring + turn % STAGES * STAGE_BYTES;
    if constexpr (STAGES == 2) {
      if (index + gridDim.y < p.tiles) copy_window(p, tile_of(p, index + gridDim.y), channel0, ring + (turn + 1) % STAGES * STAGE_BYTES);
      copy_async_commit();
    }
    copy_async_wait<STAGES - 1>();
    __syncthreads();  // the window is complete for all threads

    const Tile tile = tile_of(p, index);
#pragma unroll 1
    for (u32 item = warp / GROUP_PAIRS; item < BANDS * UNIT_PAIRS; item += WARPS / GROUP_PAIRS) {
      const u32 band = item / UNIT_PAIRS, first_unit = 2 * (item - band * UNIT_PAIRS);
      const u32 unit = min(first_unit + half, static_cast<u32>(TILE_UNITS - 1)), image = unit / UNITS;
      const u32 source = stage + (image * WINDOW_H + band * (ROWS * STRIDE_H)) * ROW_BYTES + group0 * LINE_BYTES +
                         16 * (8 * (unit - image * UNITS) + (lane & 7));
      // What this lane stores of a row of outputs: a pixel of unit quad / 2, the channels of group quad % 2.
      const u32 out_unit = first_unit + (quad >> 1), out_image = out_unit / UNITS, channel = channel0 + 8 * (group0 + (quad & 1));
      const u32 y = tile.y + band * ROWS, x = tile.x + 8 * (out_unit - out_image * UNITS) + lane / 4;
      const bool stored = out_unit < TILE_UNITS && tile.image + out_image < p.images && x < p.out_w && channel < p.channels;
      const u32 output = stored ? ((tile.image + out_image) * p.out_h + y) * p.out_w + x : NO_OUTPUT;
      const int in_y = static_cast<int>(y * STRIDE_H) - p.pad_h;

      float d[ROWS][2][4] = {};
#pragma unroll
      for (int i = 0; i < (ROWS - 1) * STRIDE_H + (KERNEL_H - 1) * DILATION_H + 1; ++i) {
        if (static_cast<u32>(in_y + i) < p.in_h) {
#pragma unroll
          for (int g = 0; g < 2; ++g)
#pragma unroll
            for (int j = 0; j < TAP_PAIRS; ++j) {
              u32 a[4];
              load_matrix_x4(a, source + i * ROW_BYTES + g * LINE_BYTES + tap_offset[j]);
#pragma unroll
              for (int o = 0; o < ROWS; ++o) {
                const int offset = i - o * STRIDE_H, r = offset / DILATION_H;
                if (offset < 0 || offset % DILATION_H != 0 || r >= KERNEL_H) continue;
                weights[g].multiply(d[o][g], a, r * TAP_PAIRS + j, diagonal);
              }
            }
        }
        // The row of outputs whose last input this was.
        const int last = i - (KERNEL_H - 1) * DILATION_H, o = last / STRIDE_H;
        if (last >= 0 && last % STRIDE_H == 0) {
          const bool whole = output != NO_OUTPUT && y + o < p.out_h;
          const u32 row = whole ? output + o * p.out_w : 0, column = whole ? channel : 0;
          const Epilogue::Inputs inputs = Epilogue::fetch(p, row, column, 8);  // a load that always happens needs no merging
          float v[8] = {d[o][0][0], d[o][0][1], d[o][1][0], d[o][1][1], d[o][0][2], d[o][0][3], d[o][1][2], d[o][1][3]};
          transpose_quad(v, quad);
          if (whole) Epilogue::store(p, row, column, 8, v, inputs);
        }
      }
    }
    __syncthreads();  // all have left the window
    if constexpr (STAGES == 1) {
      if (index + gridDim.y < p.tiles) copy_window(p, tile_of(p, index + gridDim.y), channel0, ring);
      copy_async_commit();
    }
  }
  stamp_end(p.stamp);
}
