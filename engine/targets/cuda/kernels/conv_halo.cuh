// Convolution at stride 1 of at most 128 bytes of channels for sm_90a, on wgmma. Neighbouring output pixels share most of what they
// read, so a block brings the pixels under a tile of outputs to shared memory once, and reads them as one operand for each kernel
// position: a matrix may start at any of its rows. Filters stay in shared memory.
//
// That needs pixels that lie alike around every output. Outputs are counted in a grid that has as many pixels a line, and lines an
// image, as image and padding on one side: what lies behind the end of a line is the padding before the next one, and zero. A copy of
// the engine walks through the grid over lines and images (conv_halo.py describes it so). Outputs that there are not are not stored.
//
// Persistent and warp-specialised as mma/wgmma_pipeline.cuh: one thread keeps a ring of STAGES halos filled for two consumer
// warpgroups that take tiles in turn. The blocks along y share the columns of a tile.
#pragma once
#include "epilogue/grid_places.cuh"
#include "ptx/barrier.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "ptx/tma_im2col.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int TILE_M = config::tile_m, TILE_N = config::tile_n, STAGES = config::stages;
// SWAPPED: filters are the first operand, so that an instruction covers all pixels of the tile: it reads less shared memory for each
// product than one of 64 pixels and few columns. Accumulators then hold the transposed result.
constexpr bool SWAPPED = config::swapped;
constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);
constexpr int PARTS = (SWAPPED ? TILE_N : TILE_M) / 64, WIDE = SWAPPED ? TILE_M : TILE_N;  // one instruction covers 64 × WIDE
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
constexpr int RESERVED = SWAPPED ? 88 : 76;  // registers of a consumer for anything but accumulators and operands of the epilogue
static_assert(128 * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) <= 168 * THREADS, "a block has 168 for a thread");
constexpr int ROW_BYTES = 128, TILE_K = ROW_BYTES / sizeof(Element), TAP_BYTES = TILE_N * ROW_BYTES;
constexpr u32 ROW = ROW_BYTES >> 4;  // in a descriptor
constexpr int ACCUMULATORS = PARTS * WIDE / 2;

using Layout = PlaceLayout<SWAPPED, PARTS, WIDE>::Type;

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 filters = shared_address(shared), ring = filters + p.taps * TAP_BYTES;
  const u32 full = ring + STAGES * p.halo_bytes, empty = full + 8 * STAGES, turn = empty + 8 * STAGES, ready = turn + 8 * CONSUMERS;
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
        const u32 line = tile * TILE_M / p.grid_w, image = line / p.grid_h;
        const int x = static_cast<int>(tile * TILE_M - line * p.grid_w) - p.pad_w, y = static_cast<int>(line - image * p.grid_h) - p.pad_h;
        barrier_wait(empty + 8 * stage, parity);
        barrier_arrive_expect(full + 8 * stage, p.halo_bytes);
        copy_pixels(ring + stage * p.halo_bytes, p.map_a, full + 8 * stage, 0, x, y, image, 0, 0);
        if (++stage == STAGES) { stage = 0; parity ^= 1; }
      }
    }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const u32 consumer = warpgroup - 1;
    const bool leader = threadIdx.x % 128 == 0;
    const u64 a0 = operand_descriptor<ROW_BYTES>(ring), b0 = operand_descriptor<ROW_BYTES>(filters);
    const u32 stage_step = p.halo_bytes >> 4, line_step = p.tap_line * ROW, pixel_step = p.tap_pixel * ROW;
    Layout layout(column0, p.n);
    EarlyEpilogue<Epilogue, Layout, CONSUMER_REGISTERS - RESERVED - ACCUMULATORS> epilogue;
    epilogue.begin_columns(p, layout);
    barrier_wait(ready, 0);
    u32 ordinal = consumer;  // of this block's tiles
    for (u32 tile = blockIdx.x + ordinal * gridDim.x; tile < p.tiles; tile += CONSUMERS * gridDim.x, ordinal += CONSUMERS) {
      const u32 stage = ordinal % STAGES;
      layout.take(tile * TILE_M);
      epilogue.begin(p, layout);  // while the other consumer multiplies
      // A barrier's parity says nothing two phases later: wait until the other consumer is through with the stage before.
      if (ordinal > 0) barrier_wait(turn + 8 * consumer, (ordinal - 1) / CONSUMERS & 1);
      barrier_wait(full + 8 * stage, ordinal / STAGES & 1);

      float d[PARTS][WIDE / 2];
      u64 line = a0 + stage * stage_step, a = line, b = b0;
      // There is a tap: a loop that could be left out would let accumulators meet others while products are under way (C7519).
      u32 tap = 0, across = 0;
      do {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < ROW_BYTES / 32; ++k)  // an instruction takes 32 bytes of k
#pragma unroll
          for (int i = 0; i < PARTS; ++i) {
            if constexpr (SWAPPED) wgmma<WIDE, Element>(d[i], b + 64 * ROW * i + 2 * k, a + 2 * k, tap | k);
            else wgmma<WIDE, Element>(d[i], a + 64 * ROW * i + 2 * k, b + 2 * k, tap | k);
          }
        wgmma_commit();
        a += pixel_step;
        b += TILE_N * ROW;
        if (++across == p.kernel_w) {
          across = 0;
          a = line += line_step;
        }
      } while (++tap < p.taps);
      // Each warp hands the turn on: this one may still wait for another of its own, which would find its turn two phases late.
      if (threadIdx.x % 32 == 0) barrier_arrive(turn + 8 * (consumer ^ 1));
      wgmma_wait<0>();
      if (leader) barrier_arrive(empty + 8 * stage);
#pragma unroll
      for (int i = 0; i < PARTS; ++i) wgmma_settle(d[i]);
      epilogue.store(p, layout, d);
    }
  }
  stamp_end(p.stamp, threadIdx.x % 128 == 0);  // the producer is through long before the consumers
}
