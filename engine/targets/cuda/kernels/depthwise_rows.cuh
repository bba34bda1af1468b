// Depthwise convolution of fp16 or bf16 images in NHWC for sm_90a: rows of pixels stream through shared memory, each read from memory
// once, and through the matrix units (mma/diagonal.cuh). Sums in fp32.
//
// All images stand on top of each other in one column of rows, `pitch` rows an image: between two images lie as many rows of padding as
// a filter has to meet there. A block takes a panel of channels and UNITS · 8 pixels of the width; STREAMS parts of the column, each of
// `outputs` rows of results, run through it side by side. Rows lie in a ring of STAGES, ROWS rows each; the copy engine brings a row at
// a time and fills in what lies outside the image. Rows of results that lie between two images are computed and not stored.
//
// A warp has two units of eight pixels and two groups of eight channels. It reads a row from shared memory once for every pair of
// horizontal taps, adds it to all LIVE rows of results that it belongs to, and finishes at most one of them: sums go through 1 KiB of
// shared memory, so that a lane stores eight channels of a pixel. The loop over rows is unrolled over PERIOD of them, after which the
// accumulators have the same roles again. Warps meet nowhere; the first one asks for a stage's next rows when it is itself through with
// the stage behind, so that it seldom waits for the others.
//
// With `sums`, what is stored is added up image by image, too (epilogue/image_sums.cuh): an image lies in as many parts as streams have
// rows of it.
//
// w is packed [channel][WORDS], words of two horizontal taps. NOTES: an infinite input meets weights of zero, so it turns the other
// seven channels of its group to NaN where its window is.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/image_sums.cuh"
#include "mma/column_bias.cuh"
#include "mma/diagonal.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/barrier.cuh"
#include "ptx/grid.cuh"
#include "ptx/tma_outer.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int KERNEL_H = config::kernel_h, STRIDE_H = config::stride_h, DILATION_H = config::dilation_h;
constexpr int KERNEL_W = config::kernel_w, STRIDE_W = config::stride_w, DILATION_W = config::dilation_w;
constexpr int UNITS = config::units, STREAMS = config::streams, ALL_UNITS = STREAMS * UNITS, UNIT_PAIRS = (ALL_UNITS + 1) / 2;
constexpr int PANEL = config::panel, PANEL_BYTES = 2 * PANEL, GROUP_PAIRS = PANEL / 16;
constexpr int WARPS = UNIT_PAIRS * GROUP_PAIRS, THREADS = 32 * WARPS;
constexpr int REACH = (KERNEL_H - 1) * DILATION_H, LIVE = REACH / STRIDE_H + 1, PERIOD = LIVE * STRIDE_H;
constexpr int WINDOW = (8 * UNITS - 1) * STRIDE_W + (KERNEL_W - 1) * DILATION_W + 1;  // pixels that a row of outputs meets
constexpr int LINE_BYTES = (WINDOW + 7) / 8 * 8 * PANEL_BYTES, ROW_BYTES = STREAMS * LINE_BYTES;  // whole swizzle atoms
constexpr int ROWS = config::rows, STAGES = config::stages, STAGE_BYTES = ROWS * ROW_BYTES;
constexpr int COPIED_BYTES = STREAMS * WINDOW * PANEL_BYTES;  // of a row
constexpr int SUMS_BYTES = 2 * 16 * 16 * sizeof(float);       // of a warp: two places that take turns
constexpr int TAP_PAIRS = (KERNEL_W + 1) / 2, USED = KERNEL_H * TAP_PAIRS, WORDS = (USED + 3) / 4 * 4;
static_assert(PERIOD % ROWS == 0, "a stage begins at the same rows of every period");
static_assert(STAGES * STAGE_BYTES + WARPS * SUMS_BYTES + 16 * STAGES == config::shared_bytes, "what the host asks for");

// Where byte `offset` of a line lies under the swizzle of the panel's width.
DEVICE constexpr u32 swizzled(u32 offset) { return offset ^ (offset >> 7 & (PANEL_BYTES / 16 - 1)) << 4; }

// The thread that asks the copy engine for rows.
struct Feeder {
  int y[STREAMS], image[STREAMS];
  u32 ring, full, empty, channel, row, rows, stage, parity;
  int x;
  // `first`: the block's first row of results.
  DEVICE Feeder(const Params& p, u32 ring, u32 full, u32 empty, u32 channel, int x, u32 first, u32 rows)
      : ring(ring), full(full), empty(empty), channel(channel), row(0), rows(rows), stage(0), parity(1), x(x) {
#pragma unroll
    for (int t = 0; t < STREAMS; ++t) {
      // One image further down, so that the padding above the first one counts as rows of an image, too.
      const u32 place = (first + t * p.outputs) * STRIDE_H + p.pitch - p.pad_h, above = place / p.pitch;
      y[t] = static_cast<int>(place - above * p.pitch);
      image[t] = static_cast<int>(above) - 1;
    }
  }
  // Fills the next stage when all have left it. A fresh barrier counts as completed in the phase before its first.
  DEVICE void next(const Params& p) {
    if (row >= rows) return;
    const u32 count = min(static_cast<u32>(ROWS), rows - row), landed = full + 8 * stage;
    barrier_wait(empty + 8 * stage, parity);
    barrier_arrive_expect(landed, count * COPIED_BYTES);
#pragma unroll 1
    for (u32 i = 0; i < count; ++i)
#pragma unroll
      for (int t = 0; t < STREAMS; ++t) {
        const u32 line = ring + stage * STAGE_BYTES + i * ROW_BYTES + t * LINE_BYTES;
        copy_box(line, p.map_x, landed, channel, static_cast<u32>(x), static_cast<u32>(y[t]), static_cast<u32>(image[t]));
        if (++y[t] == static_cast<int>(p.pitch)) { y[t] = 0; ++image[t]; }
      }
    row += ROWS;
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  const u32 ring = shared_address(shared), full = ring + STAGES * STAGE_BYTES + WARPS * SUMS_BYTES, empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(p.map_x);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, WARPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();

  const u32 tile = blockIdx.x / p.panels, channel0 = (blockIdx.x - tile * p.panels) * PANEL, x0 = tile * (8 * UNITS);
  const u32 first = blockIdx.y * (STREAMS * p.outputs), end = min(first + STREAMS * p.outputs, p.lines);  // of rows of results
  const u32 rows = (min(p.outputs, end - first) - 1) * STRIDE_H + REACH + 1;
  Feeder feeder(p, ring, full, empty, channel0, static_cast<int>(x0 * STRIDE_W) - p.pad_w, first, rows);
  const u32 unit0 = warp / GROUP_PAIRS * 2, group0 = warp % GROUP_PAIRS * 2;
  const DiagonalPlace place(lane);
  DiagonalWeights<Element, WORDS, USED> weights[2];
  // Filters are constants: no kernel before this one writes them.
#pragma unroll
  for (int g = 0; g < 2; ++g) weights[g].load(p.w + (channel0 + 8 * (group0 + g) + lane / 4) * (2 * WORDS), place);

  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES; ++i) feeder.next(p);

  // Lanes 0–7 name the pixels of the first unit under the first tap, 8–15 of the second unit, the others of both under the second tap.
  const u32 unit = min(unit0 + (lane >> 3 & 1), static_cast<u32>(ALL_UNITS - 1)), stream = unit / UNITS;
  u32 source[TAP_PAIRS];
#pragma unroll
  for (int j = 0; j < TAP_PAIRS; ++j) {
    const int second = 2 * j + 1 < KERNEL_W ? 2 * j + 1 : 2 * j;  // an odd last tap has a partner of weight zero
    const u32 tap = lane >> 4 ? second : 2 * j, pixel = (8 * (unit - stream * UNITS) + (lane & 7)) * STRIDE_W + tap * DILATION_W;
    source[j] = ring + stream * LINE_BYTES + swizzled(pixel * PANEL_BYTES + 16 * group0);
  }

  // What this lane stores of a row of results: eight channels of a pixel.
  const u32 out_unit = unit0 + (lane >> 4), out_stream = out_unit / UNITS, channel = channel0 + 8 * (group0 + (lane & 1));
  const u32 x = x0 + 8 * (out_unit - out_stream * UNITS) + (lane >> 1 & 7), begin = first + out_stream * p.outputs;
  const bool present = out_unit < ALL_UNITS && x < p.out_w && channel < p.channels && begin < end;
  const u32 own = out_unit < ALL_UNITS && begin < end ? min(p.outputs, end - begin) : 0;  // rows of the unit's stream
  const u32 mine = present ? own : 0, column = present ? channel : 0;
  const Epilogue::Fixed fixed = Epilogue::fetch_fixed(p, column, 8);
  const u32 out_pitch = p.pitch / STRIDE_H, between = (p.out_h - out_pitch) * p.out_w;
  // The first LIVE − 1 rows that are finished lie before `begin` and lack some of their inputs.
  const u32 above = begin + LIVE * out_pitch - (LIVE - 1), images = above / out_pitch;
  u32 finished = 1 - LIVE, y = above - images * out_pitch, output = ((images - LIVE) * p.out_h + y) * p.out_w + x;

  // A warp's sums: 64 bytes a pixel. Pieces of 16 lie so that lanes that write two words, or read four, meet in no bank.
  float* const sums = reinterpret_cast<float*>(shared + STAGES * STAGE_BYTES + warp * SUMS_BYTES);
  u32 store_place = unknown(16 * (lane / 4) + 4 * ((lane >> 1 & 1) ^ (lane >> 3 & 1) * 3) + 2 * (lane & 1));
  u32 load_place = unknown(16 * (lane / 2) + 4 * ((lane & 1) * 2 ^ (lane >> 2 & 1) * 3));

  ColumnBias<config::bias> bias[2];
#pragma unroll
  for (int g = 0; g < 2; ++g) bias[g].load(p, channel0 + 8 * (group0 + g) + 2 * (lane & 3));

  ImageSums<config::sums, 8, 2> pixels;
  float d[LIVE][2][4] = {};
  u32 stage = 0, parity = 0;
  for (u32 row = 0; row < rows; row += PERIOD) {
#pragma unroll
    for (int i = 0; i < PERIOD; ++i) {
      if (row + i >= rows) break;
      if (i % ROWS == 0) {
        barrier_wait(full + 8 * stage, parity);
        // What was read of the stage before this one has been used by now: a stage given back as soon as its reads are under way may be
        // overwritten before they come, as they may be held up by stores, and barriers not.
        __syncwarp();
        if (lane == 0 && row + i > 0) barrier_arrive(empty + 8 * (stage == 0 ? STAGES - 1 : stage - 1));
      }
      const u32 offset = stage * STAGE_BYTES + i % ROWS * ROW_BYTES;
      if (i % STRIDE_H <= REACH) {  // else no filter meets it
#pragma unroll
        for (int g = 0; g < 2; ++g)
#pragma unroll
          for (int j = 0; j < TAP_PAIRS; ++j) {
            u32 a[4];
            load_matrix_x4(a, (source[j] ^ 16 * g) + offset);
#pragma unroll
            for (int age = 0; age < LIVE; ++age) {
              const int under = i % STRIDE_H + age * STRIDE_H, r = under / DILATION_H;
              if (under % DILATION_H != 0 || r >= KERNEL_H) continue;
              float (&sum)[4] = d[(i / STRIDE_H + LIVE - age) % LIVE][g];
              if (under == 0 && j == 0) bias[g].begin(sum);
              weights[g].multiply(sum, a, r * TAP_PAIRS + j);
            }
          }
      }
      if (i % ROWS == ROWS - 1) {
        if (threadIdx.x == 0 && row + i >= ROWS) feeder.next(p);  // the stage behind this one
        if (++stage == STAGES) { stage = 0; parity ^= 1; }
      }
      if (i % STRIDE_H == REACH % STRIDE_H) {  // the last input of a row of results
        const float (&sum)[2][4] = d[(i / STRIDE_H + 1) % LIVE];
#pragma unroll
        for (int g = 0; g < 2; ++g)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            *reinterpret_cast<float2*>(sums + (store_place ^ 8 * g) + 128 * half) = make_float2(sum[g][2 * half], sum[g][2 * half + 1]);
        __syncwarp();  // the sums are there; those of the row before have been read
        if (finished < mine && y < p.out_h) {
          const Epilogue::Varying varying = Epilogue::fetch_varying(p, output, column, 8);
          const float4 low = *reinterpret_cast<const float4*>(sums + load_place);
          const float4 high = *reinterpret_cast<const float4*>(sums + (load_place ^ 4));
          const float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
          Epilogue::store(p, output, column, 8, v, fixed, varying);
          pixels.add(v, {fixed, varying});
        }
        const bool whole = y + 1 == p.out_h, ends = finished < own && y < p.out_h && (whole || finished + 1 == own);
        pixels.end_row(p, {ends, whole, begin + finished, out_pitch, blockIdx.y * STREAMS + out_stream,
                           x0 / 8 + out_unit - out_stream * UNITS, channel});
        store_place ^= 256;
        load_place ^= 256;
        ++finished;
        output += p.out_w;
        if (++y == out_pitch) { y = 0; output += between; }
      }
    }
  }
  stamp_end(p.stamp, lane == 0);
}
