// Matrix product on mma.sync, for every GPU from Ampere on: a[z, m, k] · b[z, k, n], fp32 accumulation. Operands are fp16, bf16, e4m3
// or i8 (k innermost; made halves in registers), or fp32 (rounded to tf32, `exact`, or `refined`: only a is rounded). One block computes one tile; a ring of STAGES tiles of A and B is filled by cp.async ahead of
// the warps that multiply.
// Every layout: a_k_inner and b_k_inner say whether k is an operand's innermost axis, a_access and b_access how many bytes can be
// read at once along it.
#pragma once
#include "epilogue/fragment.cuh"
#include "mma/tile.cuh"
#include "ptx/grid.cuh"
#include "scheduler/split_k.cuh"
#include "scheduler/stamp.cuh"
#include "scheduler/tiles.cuh"

using Operand = MmaOperand<config::operand, config::exact, config::refined>;
using Element = Operand::Element;
constexpr int TILE_M = config::tile_m, TILE_N = config::tile_n, TILE_K = config::tile_k_bytes / sizeof(Element), STAGES = config::stages;
constexpr int WARPS_M = config::warps_m, WARPS_N = config::warps_n, THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr int BATCH_LEVELS = config::batch_levels;
constexpr bool SPLIT = config::split;  // several blocks, along the grid's y, share the k of a tile
constexpr bool A_K_INNER = config::a_k_inner, B_K_INNER = config::b_k_inner;

constexpr int A_ROWS = A_K_INNER ? TILE_M : TILE_K, A_ROW_BYTES = (A_K_INNER ? TILE_K : TILE_M) * sizeof(Element);
constexpr int B_ROWS = B_K_INNER ? TILE_N : TILE_K, B_ROW_BYTES = (B_K_INNER ? TILE_K : TILE_N) * sizeof(Element);
constexpr int A_BYTES = A_ROWS * A_ROW_BYTES, B_BYTES = B_ROWS * B_ROW_BYTES, STAGE_BYTES = A_BYTES + B_BYTES;
static_assert(WARP_M % 16 == 0 && WARP_N % 32 == 0, "a warp's tile is made of 16×32 fragments");
static_assert(STAGES * STAGE_BYTES == config::shared_bytes, "the host asks for the shared memory that the ring needs");

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 ring = shared_address(shared);
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 tiles_m = (p.m + TILE_M - 1) / TILE_M, tiles_n = (p.n + TILE_N - 1) / TILE_N, z = blockIdx.x / (tiles_m * tiles_n);
  const TileIndex tile = tile_of<8>(blockIdx.x - z * (tiles_m * tiles_n), tiles_m, tiles_n);
  const u32 row0 = tile.m * TILE_M, column0 = tile.n * TILE_N;
  const RowIndex<BATCH_LEVELS> index = split_row<BATCH_LEVELS>(p.batch, z);
  const Element *a = p.a, *b = p.b;
#pragma unroll
  for (int i = 0; i < BATCH_LEVELS; ++i) {
    a += index.level[i] * p.a_batch[i];
    b += index.level[i] * p.b_batch[i];
  }

  // The blocks that share a tile take as many steps each; beyond k they find zeros.
  const u32 splits = splits_of<SPLIT>(p), steps = ((p.k + TILE_K - 1) / TILE_K + splits - 1) / splits;
  const auto copy_stage = [&](u32 step) {
    const u32 stage = ring + (step % STAGES) * STAGE_BYTES, k = (blockIdx.y * steps + step) * TILE_K;
    if constexpr (A_K_INNER)
      copy_tile<Operand, THREADS, A_ROWS, A_ROW_BYTES, true, config::a_access>(stage, a, p.a_stride, row0, p.m, k, p.k);
    else
      copy_tile<Operand, THREADS, A_ROWS, A_ROW_BYTES, false, config::a_access>(stage, a, p.a_stride, k, p.k, row0, p.m);
    if constexpr (B_K_INNER)
      copy_tile<Operand, THREADS, B_ROWS, B_ROW_BYTES, true, config::b_access>(stage + A_BYTES, b, p.b_stride, column0, p.n, k, p.k);
    else
      copy_tile<Operand, THREADS, B_ROWS, B_ROW_BYTES, false, config::b_access>(stage + A_BYTES, b, p.b_stride, k, p.k, column0, p.n);
  };

#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    if (i < steps) copy_stage(i);
    copy_async_commit();
  }

  const u32 warp = threadIdx.x / 32, warp_row = warp / WARPS_N * WARP_M, warp_column = warp % WARPS_N * WARP_N;
  float d[WARP_M / 16][WARP_N / 2] = {};
  for (u32 step = 0; step < steps; ++step) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // stage `step` is complete for all threads, and all have left the stage that is filled next
    if (step + STAGES - 1 < steps) copy_stage(step + STAGES - 1);
    copy_async_commit();
    const u32 stage = ring + (step % STAGES) * STAGE_BYTES;
    multiply_stage<Operand, WARP_M, WARP_N, TILE_K, A_K_INNER, A_ROW_BYTES, B_K_INNER, B_ROW_BYTES>(d, stage, stage + A_BYTES, warp_row, warp_column);
  }

  const u32 lane = threadIdx.x & 31;
  if (add_splits<SPLIT>(p, d, blockIdx.x * (THREADS / 32) + warp, blockIdx.y)) {
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i)
      emit_fragment<Epilogue, WARP_N / 8>(p, d[i], z * p.m, row0 + warp_row + 16 * i + lane / 4, p.m, column0 + warp_column, p.n);
  }
  stamp_end(p.stamp);
}
