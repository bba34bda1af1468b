// Convolution at stride 1 of at most 128 bytes of channels for sm_90a, on wgmma, of whose results only the maxima over windows of 2 × 2
// pixels are stored. As in conv_halo.cuh a block brings the pixels under a tile once and reads them as one operand for each kernel
// position, and filters stay in shared memory; a tile is WIDE output pixels of two lines that windows lie in.
//
// Filters are the first operand, so that an instruction covers all pixels of a line. A lane then has neighbouring pixels of both lines:
// all of a window.
//
// Persistent and warp-specialised as mma/wgmma_pipeline.cuh: one thread keeps a ring of STAGES tiles' pixels filled, line by line, for two
// consumer warpgroups that take tiles in turn. The blocks along y share the columns of a tile.
#pragma once
#include "epilogue/early.cuh"
#include "ptx/barrier.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "ptx/tma_im2col.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int WIDE = config::wide, TILE_N = 64, STAGES = config::stages, LINES = 2;
constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
constexpr int RESERVED = 88;  // registers of a consumer for anything but accumulators and operands of the epilogue
static_assert(128 * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) <= 168 * THREADS, "a block has 168 for a thread");
constexpr int ROW_BYTES = 128, TILE_K = ROW_BYTES / sizeof(Element), TAP_BYTES = TILE_N * ROW_BYTES;
constexpr u32 ROW = ROW_BYTES >> 4;  // in a descriptor
constexpr int BLOCKS = WIDE / 8, ACCUMULATORS = LINES * WIDE / 2;

// A tile's first window.
struct Windows { u32 image, y, x; };
DEVICE Windows windows_of(const Params& p, u32 tile) {
  const u32 line = tile / p.across, image = line / p.out_h;
  return {image, line - image * p.out_h, (tile - line * p.across) * (WIDE / 2)};
}

// What a lane has of a tile's maxima, which are transposed: a layout for epilogue/early.cuh. Of each block of eight pixels it has one of
// four windows, and two columns eight apart; pieces come from eight blocks, of which the last ones need not be there.
struct WindowColumns {
  static constexpr int CHUNK = 2, TOTAL = CHUNK * ((BLOCKS + 7) / 8), FIXED = 1, TOGETHER = CHUNK;
  static constexpr bool BLOCKS_OF_ROWS = false;
  u32 line, x, width, first, columns;  // the first window of the line's, the lane's first in it, how many there are of both
  DEVICE WindowColumns(u32 column, u32 columns) : columns(columns) { first = column + 16 * (threadIdx.x / 32 & 3) + 8 * (threadIdx.x / 4 & 1); }
  DEVICE void take(const Params& p, const Windows& windows) {
    line = (windows.image * p.out_h + windows.y) * p.out_w;
    x = windows.x + own();
    width = min(p.out_w, windows.x + WIDE / 2);
  }
  DEVICE WindowColumns again() const {
    WindowColumns same = *this;
    same.x = unknown(x);
    return same;
  }
  DEVICE static constexpr int fixed_of(int) { return 0; }
  DEVICE u32 column(int) const { return first; }
  DEVICE bool row(const Params&, int piece, u32& found) const {
    found = line + x + 16 * piece;
    return x + 16 * piece < width;
  }
  DEVICE void gather(const float (&maxima)[2 * BLOCKS], int piece, float (&v)[2][8]) const {
    float sixteen[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int block = 4 * piece + j % 8;
      sixteen[j] = block < BLOCKS ? maxima[2 * block + j / 8] : 0;
    }
    transpose_octet(sixteen, threadIdx.x / 4 & 7);
#pragma unroll
    for (int j = 0; j < 16; ++j) v[j / 8][j % 8] = sixteen[j];
  }

 private:
  DEVICE static u32 own() { return (threadIdx.x & 3) + 4 * (threadIdx.x / 8 & 3); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 filters = shared_address(shared), ring = filters + p.taps * TAP_BYTES;
  const u32 full = ring + STAGES * p.stage_bytes, empty = full + 8 * STAGES, turn = empty + 8 * STAGES, ready = turn + 8 * CONSUMERS;
  const u32 warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), column0 = blockIdx.y * TILE_N;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(p.map_a);
    for (int i = 0; i < 2 * STAGES + CONSUMERS + 1; ++i) barrier_init(full + 8 * i, i >= 2 * STAGES && i < 2 * STAGES + CONSUMERS ? 4 : 1);
    barrier_init_fence();
    // Filters are constants: no kernel before this one writes them.
    barrier_arrive_expect(ready, p.taps * TAP_BYTES);
    for (u32 tap = 0; tap < p.taps; ++tap) copy_box(filters + tap * TAP_BYTES, p.map_b, ready, tap * TILE_K, column0);
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  if (warpgroup == 0) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) {
      u32 stage = 0, parity = 1;  // a fresh barrier counts as completed in the phase before its first
      for (u32 tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const Windows windows = windows_of(p, tile);
        const int x = static_cast<int>(2 * windows.x) - p.pad_w, y = static_cast<int>(2 * windows.y) - p.pad_h;
        barrier_wait(empty + 8 * stage, parity);
        barrier_arrive_expect(full + 8 * stage, p.lines * p.line_bytes);
        u32 destination = ring + stage * p.stage_bytes;
        for (u32 line = 0; line < p.lines; ++line, destination += p.line_step)
          copy_pixels(destination, p.map_a, full + 8 * stage, 0, x, y + static_cast<int>(line), windows.image, 0, 0);
        if (++stage == STAGES) { stage = 0; parity ^= 1; }
      }
    }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const u32 consumer = warpgroup - 1;
    const bool leader = threadIdx.x % 128 == 0;
    const u64 pixels0 = operand_descriptor<ROW_BYTES>(ring), filters0 = operand_descriptor<ROW_BYTES>(filters);
    const u32 stage_step = p.stage_bytes >> 4, lower = p.line_step >> 4, line_step = p.dilation_h * lower, pixel_step = p.dilation_w * ROW;
    WindowColumns layout(column0, p.n);
    EarlyEpilogue<Epilogue, WindowColumns, CONSUMER_REGISTERS - RESERVED - ACCUMULATORS> epilogue;
    epilogue.begin_columns(p, layout);
    barrier_wait(ready, 0);
    u32 ordinal = consumer;  // of this block's tiles
    for (u32 tile = blockIdx.x + ordinal * gridDim.x; tile < p.tiles; tile += CONSUMERS * gridDim.x, ordinal += CONSUMERS) {
      const u32 stage = ordinal % STAGES;
      layout.take(p, windows_of(p, tile));
      epilogue.begin(p, layout);  // while the other consumer multiplies
      // A barrier's parity says nothing two phases later: wait until the other consumer is through with the stage before.
      if (ordinal > 0) barrier_wait(turn + 8 * consumer, (ordinal - 1) / CONSUMERS & 1);
      barrier_wait(full + 8 * stage, ordinal / STAGES & 1);

      float d[LINES][WIDE / 2];
      u64 line = pixels0 + stage * stage_step, pixels = line, weights = filters0;
      // There is a tap: a loop that could be left out would let accumulators meet others while products are under way (C7519).
      u32 tap = 0, across = 0;
      do {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < ROW_BYTES / 32; ++k)  // an instruction takes 32 bytes of k
#pragma unroll
          for (int i = 0; i < LINES; ++i) wgmma<WIDE, Element>(d[i], weights + 2 * k, pixels + i * lower + 2 * k, tap | k);
        wgmma_commit();
        pixels += pixel_step;
        weights += TILE_N * ROW;
        if (++across == p.kernel_w) {
          across = 0;
          pixels = line += line_step;
        }
      } while (++tap < p.taps);
      // Each warp hands the turn on: this one may still wait for another of its own, which would find its turn two phases late.
      if (threadIdx.x % 32 == 0) barrier_arrive(turn + 8 * (consumer ^ 1));
      wgmma_wait<0>();
      if (leader) barrier_arrive(empty + 8 * stage);
#pragma unroll
      for (int i = 0; i < LINES; ++i) wgmma_settle(d[i]);
      float maxima[2 * BLOCKS];
#pragma unroll
      for (int i = 0; i < 2 * BLOCKS; ++i) maxima[i] = max_nan(max_nan(d[0][2 * i], d[0][2 * i + 1]), max_nan(d[1][2 * i], d[1][2 * i + 1]));
      epilogue.store(p, layout, maxima);
    }
  }
  stamp_end(p.stamp, threadIdx.x % 128 == 0);  // the producer is through long before the consumers
}
