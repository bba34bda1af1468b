// Matrix product on the ordinary units, for what the matrix units do not take: fp64, integers, operands of two types. Any strides.
// Operands are widened to Value, in which the sums are taken, too; integers wrap as in two's complement. A block computes a tile of
// 64×64, a thread ROWS rows of WIDTH columns of it.
#pragma once
#include "epilogue/access.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"
#include "scheduler/tiles.cuh"

using Value = config::value_t;
constexpr int TILE = 64, TILE_K = 16, ROWS = 4, THREADS = TILE / ROWS * (TILE / WIDTH), BATCH_LEVELS = config::batch_levels;
static_assert(THREADS == 128 && TILE * TILE_K % THREADS == 0, "the host launches so many threads");

// A tile of an operand as [k][row or column]; what lies outside is zero. K_INNER: neighbouring threads read along k.
template <bool K_INNER, class T>
DEVICE void copy_values(Value (&tile)[TILE_K][TILE], const T* source, i64 line_stride, i64 k_stride, u32 line0, u32 lines, u32 k0, u32 k) {
#pragma unroll
  for (int i = 0; i < TILE * TILE_K / THREADS; ++i) {
    const u32 index = i * THREADS + threadIdx.x, line = K_INNER ? index / TILE_K : index % TILE, at = K_INNER ? index % TILE_K : index / TILE;
    const bool inside = line0 + line < lines && k0 + at < k;
    tile[at][line] = inside ? static_cast<Value>(widen(source[(line0 + line) * line_stride + (k0 + at) * k_stride])) : Value(0);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) kernel(const __grid_constant__ Params p) {
  __shared__ __align__(16) Value a_tile[TILE_K][TILE], b_tile[TILE_K][TILE];
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 tiles_m = (p.m + TILE - 1) / TILE, tiles_n = (p.n + TILE - 1) / TILE, z = blockIdx.x / (tiles_m * tiles_n);
  const TileIndex tile = tile_of<8>(blockIdx.x - z * (tiles_m * tiles_n), tiles_m, tiles_n);
  const u32 row0 = tile.m * TILE, column0 = tile.n * TILE;
  const RowIndex<BATCH_LEVELS> index = split_row<BATCH_LEVELS>(p.batch, z);
  auto a = p.a;
  auto b = p.b;
#pragma unroll
  for (int i = 0; i < BATCH_LEVELS; ++i) {
    a += index.level[i] * p.a_batch[i];
    b += index.level[i] * p.b_batch[i];
  }

  const u32 row = threadIdx.x / (TILE / WIDTH) * ROWS, column = threadIdx.x % (TILE / WIDTH) * WIDTH;  // within the tile
  Value sum[ROWS][WIDTH] = {};
  for (u32 k = 0; k < p.k; k += TILE_K) {
    copy_values<config::a_k_inner>(a_tile, a, p.a_row, p.a_k, row0, p.m, k, p.k);
    copy_values<config::b_k_inner>(b_tile, b, p.b_column, p.b_k, column0, p.n, k, p.k);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TILE_K; ++i) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int c = 0; c < WIDTH; ++c) sum[r][c] += a_tile[i][row + r] * b_tile[i][column + c];
    }
    __syncthreads();  // before the tiles are filled again
  }

  if (column0 + column < p.n) {
    const u32 count = min(static_cast<u32>(WIDTH), p.n - column0 - column);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      compute_t<config::acc_t> acc[WIDTH];
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) acc[c] = static_cast<compute_t<config::acc_t>>(static_cast<config::acc_t>(sum[r][c]));
      if (row0 + row + r < p.m) Epilogue::store(p, z * p.m + row0 + row + r, column0 + column, count, acc);
    }
  }
  stamp_end(p.stamp);
}
