// Convolution at stride 1 of any number of channels for sm_90a, on wgmma: as conv_halo.cuh, with several panels of channels. The
// pixels under a tile of outputs come once for each panel, a ring of HALOS, and are read as one operand for each kernel position.
// Filters stream through a ring of their own, STAGES boxes of a panel at one kernel position.
//
// Persistent and warp-specialised: one thread keeps both rings filled for two consumer warpgroups. These share every tile, half of its
// pixels each; or, SWAPPED, half of its columns each: filters are then the first operand, an instruction covers all pixels of the tile,
// and accumulators hold the transposed result. The blocks along y share the columns of a tile.
#pragma once
#include "epilogue/grid_places.cuh"
#include "ptx/barrier.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "ptx/tma_im2col.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int TILE_M = config::tile_m, TILE_N = config::tile_n, HALOS = config::halos, STAGES = config::stages;
constexpr bool SWAPPED = config::swapped;
constexpr int CONSUMERS = 2, THREADS = 128 * (1 + CONSUMERS);
constexpr int PARTS = (SWAPPED ? TILE_N : TILE_M) / (64 * CONSUMERS), WIDE = SWAPPED ? TILE_M : TILE_N;  // an instruction: 64 × WIDE
static_assert(PARTS > 0 && (SWAPPED ? TILE_N : TILE_M) % (64 * CONSUMERS) == 0, "consumers halve the rows of the instruction");
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
constexpr int RESERVED = SWAPPED ? 92 : 100;  // registers of a consumer for anything but accumulators and operands of the epilogue
static_assert(128 * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) <= 168 * THREADS, "a block has 168 for a thread");
constexpr int PANEL_BYTES = config::panel_bytes, PANEL = PANEL_BYTES / sizeof(Element), FILTER_BYTES = TILE_N * PANEL_BYTES;
constexpr u32 ROW = PANEL_BYTES >> 4;  // in a descriptor
constexpr int ACCUMULATORS = PARTS * WIDE / 2;

using Layout = PlaceLayout<SWAPPED, PARTS, WIDE>::Type;

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 filters = shared_address(shared), halos = filters + STAGES * FILTER_BYTES;
  const u32 full = halos + HALOS * p.halo_bytes, empty = full + 8 * STAGES, full_halo = empty + 8 * STAGES, empty_halo = full_halo + 8 * HALOS;
  const u32 warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), column0 = blockIdx.y * TILE_N;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(p.map_a);
    prefetch_tensor_map(p.map_b);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, CONSUMERS);
    }
    for (int i = 0; i < HALOS; ++i) {
      barrier_init(full_halo + 8 * i, 1);
      barrier_init(empty_halo + 8 * i, CONSUMERS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  if (warpgroup == 0) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) {
      u32 stage = 0, parity = 1, halo = 0, halo_parity = 1;  // a fresh barrier counts as completed in the phase before its first
      for (u32 tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const u32 line = tile * TILE_M / p.grid_w, image = line / p.grid_h;
        const int x = static_cast<int>(tile * TILE_M - line * p.grid_w) - p.pad_w, y = static_cast<int>(line - image * p.grid_h) - p.pad_h;
        for (u32 channel = 0; channel < p.padded; channel += PANEL) {
          barrier_wait(empty_halo + 8 * halo, halo_parity);
          barrier_arrive_expect(full_halo + 8 * halo, p.halo_bytes);
          copy_pixels(halos + halo * p.halo_bytes, p.map_a, full_halo + 8 * halo, channel, x, y, image, 0, 0);
          if (++halo == HALOS) { halo = 0; halo_parity ^= 1; }
          for (u32 tap = 0; tap < p.taps; ++tap) {
            barrier_wait(empty + 8 * stage, parity);
            barrier_arrive_expect(full + 8 * stage, FILTER_BYTES);
            copy_box(filters + stage * FILTER_BYTES, p.map_b, full + 8 * stage, tap * p.padded + channel, column0);
            if (++stage == STAGES) { stage = 0; parity ^= 1; }
          }
        }
      }
    }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const u32 consumer = warpgroup - 1;
    const bool leader = threadIdx.x % 128 == 0;
    const u32 own_place = SWAPPED ? 0 : consumer * (TILE_M / CONSUMERS), own_column = SWAPPED ? consumer * (TILE_N / CONSUMERS) : 0;
    const u64 pixels0 = operand_descriptor<PANEL_BYTES>(halos + own_place * PANEL_BYTES);
    const u64 filters0 = operand_descriptor<PANEL_BYTES>(filters + own_column * PANEL_BYTES);
    const u32 halo_step = p.halo_bytes >> 4, line_step = p.tap_line * ROW, pixel_step = p.tap_pixel * ROW;
    Layout layout(column0 + own_column, p.n);
    EarlyEpilogue<Epilogue, Layout, CONSUMER_REGISTERS - RESERVED - ACCUMULATORS> epilogue;
    epilogue.begin_columns(p, layout);
    u32 stage = 0, parity = 0, halo = 0, halo_parity = 0;
    for (u32 tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
      layout.take(tile * TILE_M + own_place);
      epilogue.begin(p, layout);

      float d[PARTS][WIDE / 2];
      u64 line = 0, a = 0;
      u32 step = 0, tap = 0, across = 0, previous = 0, previous_halo = 0;
      // There is a step: a loop that could be left out would let accumulators meet others while products are under way (C7519).
      do {
        if (tap == 0) {
          barrier_wait(full_halo + 8 * halo, halo_parity);
          line = a = pixels0 + halo * halo_step;
        }
        barrier_wait(full + 8 * stage, parity);
        const u64 b = filters0 + stage * (FILTER_BYTES >> 4);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < PANEL_BYTES / 32; ++k)  // an instruction takes 32 bytes of k
#pragma unroll
          for (int i = 0; i < PARTS; ++i) {
            if constexpr (SWAPPED) wgmma<WIDE, Element>(d[i], b + 64 * ROW * i + 2 * k, a + 2 * k, step | k);
            else wgmma<WIDE, Element>(d[i], a + 64 * ROW * i + 2 * k, b + 2 * k, step | k);
          }
        wgmma_commit();
        if (step > 0) {  // the products of the step before are done
          wgmma_wait<1>();
          if (leader) {
            barrier_arrive(empty + 8 * previous);
            if (tap == 0) barrier_arrive(empty_halo + 8 * previous_halo);
          }
        }
        previous = stage;
        previous_halo = halo;
        if (++stage == STAGES) { stage = 0; parity ^= 1; }
        a += pixel_step;
        if (++across == p.kernel_w) {
          across = 0;
          a = line += line_step;
        }
        if (++tap == p.taps) {
          tap = across = 0;
          if (++halo == HALOS) { halo = 0; halo_parity ^= 1; }
        }
      } while (++step < p.steps);
      wgmma_wait<0>();
      if (leader) {
        barrier_arrive(empty + 8 * previous);
        barrier_arrive(empty_halo + 8 * previous_halo);
      }
#pragma unroll
      for (int i = 0; i < PARTS; ++i) wgmma_settle(d[i]);
      epilogue.store(p, layout, d);
    }
  }
  stamp_end(p.stamp, threadIdx.x % 128 == 0);  // the producer is through long before the consumers
}
