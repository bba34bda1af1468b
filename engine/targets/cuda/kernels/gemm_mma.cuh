// Matrix product on mma.sync, for every GPU from Ampere on: a[z, m, k] · b[z, k, n] with fp16 operands, fp32 accumulation.
// One block computes one tile; a ring of STAGES tiles of A and B is filled by cp.async ahead of the warps that multiply.
// NOTES: k of both operands counts in whole 16-byte chunks where a_vector and b_vector say so, else halves are read one by one.
#pragma once
#include "epilogue/fragment.cuh"
#include "mma/tile.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"
#include "scheduler/tiles.cuh"

constexpr int TILE_M = config::tile_m, TILE_N = config::tile_n, TILE_K = config::tile_k, STAGES = config::stages;
constexpr int WARPS_M = config::warps_m, WARPS_N = config::warps_n, THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr bool B_K_INNER = config::b_k_inner;

constexpr int A_ROW_BYTES = TILE_K * 2, B_ROWS = B_K_INNER ? TILE_N : TILE_K, B_ROW_BYTES = (B_K_INNER ? TILE_K : TILE_N) * 2;
constexpr int A_BYTES = TILE_M * A_ROW_BYTES, B_BYTES = B_ROWS * B_ROW_BYTES, STAGE_BYTES = A_BYTES + B_BYTES;
static_assert(WARP_M % 16 == 0 && WARP_N % 32 == 0, "a warp's tile is made of 16×32 fragments");
static_assert(STAGES * STAGE_BYTES == config::shared_bytes, "the host asks for the shared memory that the ring needs");

// Copies ROWS × (ROW_BYTES / 2) halves, rows `stride` apart, into a swizzled tile; what lies outside rows × columns is zero.
template <int ROWS, int ROW_BYTES, bool VECTOR>
DEVICE void copy_tile(u32 tile, const half* source, i64 stride, u32 row0, u32 rows, u32 column0, u32 columns) {
  constexpr int CHUNKS = ROW_BYTES / 16, ROWS_PER_PASS = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0, "every thread stays in its column of chunks");
  const u32 chunk = threadIdx.x % CHUNKS, column = column0 + 8 * chunk;
#pragma unroll
  for (int pass = 0; pass < (ROWS + ROWS_PER_PASS - 1) / ROWS_PER_PASS; ++pass) {
    const u32 local = pass * ROWS_PER_PASS + threadIdx.x / CHUNKS, row = row0 + local;
    if (ROWS % ROWS_PER_PASS != 0 && local >= ROWS) break;
    const u32 destination = tile + swizzled<ROW_BYTES>(local, chunk);
    const half* p = source + row * stride + column;
    if constexpr (VECTOR) {
      copy_async_16(destination, p, row < rows && column < columns);
    } else {
      u32 packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const u32 low = row < rows && column + 2 * i < columns ? p[2 * i].bits : 0;
        const u32 high = row < rows && column + 2 * i + 1 < columns ? p[2 * i + 1].bits : 0;
        packed[i] = low | high << 16;
      }
      store_shared_16(destination, make_uint4(packed[0], packed[1], packed[2], packed[3]));
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 ring = shared_address(shared);
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const TileIndex tile = tile_of<8>(blockIdx.x, (p.m + TILE_M - 1) / TILE_M, (p.n + TILE_N - 1) / TILE_N);
  const u32 row0 = tile.m * TILE_M, column0 = tile.n * TILE_N, z = blockIdx.y;
  const u32 z_outer = z / p.batch_inner, z_inner = z - z_outer * p.batch_inner;
  const half* a = p.a + z_outer * p.a_batch[0] + z_inner * p.a_batch[1];
  const half* b = p.b + z_outer * p.b_batch[0] + z_inner * p.b_batch[1];

  const auto copy_stage = [&](u32 step) {
    const u32 stage = ring + (step % STAGES) * STAGE_BYTES, k = step * TILE_K;
    copy_tile<TILE_M, A_ROW_BYTES, config::a_vector>(stage, a, p.a_stride, row0, p.m, k, p.k);
    if constexpr (B_K_INNER) copy_tile<TILE_N, B_ROW_BYTES, config::b_vector>(stage + A_BYTES, b, p.b_stride, column0, p.n, k, p.k);
    else copy_tile<TILE_K, B_ROW_BYTES, config::b_vector>(stage + A_BYTES, b, p.b_stride, k, p.k, column0, p.n);
  };

  const u32 steps = (p.k + TILE_K - 1) / TILE_K;
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
    multiply_stage<WARP_M, WARP_N, TILE_K, B_K_INNER, B_ROW_BYTES>(d, stage, stage + A_BYTES, warp_row, warp_column);
  }

  const u32 lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < WARP_M / 16; ++i)
    emit_fragment<Epilogue, WARP_N / 8>(p, d[i], z * p.m, row0 + warp_row + 16 * i + lane / 4, p.m, column0 + warp_column, p.n);
  stamp_end(p.stamp);
}
