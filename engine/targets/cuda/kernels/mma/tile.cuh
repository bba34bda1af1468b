// Tiles of halves in shared memory and the warp's share of a tile product.
#pragma once
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"

// Byte offset of 16-byte chunk `chunk` of row `row`. The exclusive-or spreads the eight rows that one ldmatrix reads over all
// 32 banks. Rows are 64 bytes or a multiple of 128.
template <int ROW_BYTES> DEVICE u32 swizzled(u32 row, u32 chunk) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES % 128 == 0, "");
  return row * ROW_BYTES + ((chunk ^ (ROW_BYTES == 64 ? (row >> 1) & 3 : row & 7)) << 4);
}

// A 16×16 operand A at (row, 16-column step k) of a row-major tile.
template <int ROW_BYTES> DEVICE void load_a(u32 (&a)[4], u32 tile, u32 row, u32 k) {
  const u32 lane = threadIdx.x & 31;
  load_matrix_x4(a, tile + swizzled<ROW_BYTES>(row + (lane & 15), 2 * k + (lane >> 4)));
}
// Operand B for two 8-column blocks from `column` on, where the tile's rows are B's columns (k is innermost):
// b[0], b[1] for the first block, b[2], b[3] for the second.
template <int ROW_BYTES> DEVICE void load_b_k_inner(u32 (&b)[4], u32 tile, u32 column, u32 k) {
  const u32 lane = threadIdx.x & 31;
  load_matrix_x4(b, tile + swizzled<ROW_BYTES>(column + (lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)));
}
// The same where the tile's rows are k (B's columns are innermost).
template <int ROW_BYTES> DEVICE void load_b_n_inner(u32 (&b)[4], u32 tile, u32 column, u32 k) {
  const u32 lane = threadIdx.x & 31;
  load_matrix_x4_transposed(b, tile + swizzled<ROW_BYTES>(16 * k + (lane & 15), column / 8 + (lane >> 4)));
}

// One stage of a block's product: this warp's WARP_M × WARP_N accumulators += A[row …, TILE_K] · B[TILE_K, column …].
template <int WARP_M, int WARP_N, int TILE_K, bool B_K_INNER, int B_ROW_BYTES>
DEVICE void multiply_stage(float (&d)[WARP_M / 16][WARP_N / 2], u32 a_tile, u32 b_tile, u32 row, u32 column) {
#pragma unroll
  for (int k = 0; k < TILE_K / 16; ++k) {
    u32 a[WARP_M / 16][4], b[WARP_N / 16][4];
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i) load_a<TILE_K * 2>(a[i], a_tile, row + 16 * i, k);
#pragma unroll
    for (int j = 0; j < WARP_N / 16; ++j) {
      if constexpr (B_K_INNER) load_b_k_inner<B_ROW_BYTES>(b[j], b_tile, column + 16 * j, k);
      else load_b_n_inner<B_ROW_BYTES>(b[j], b_tile, column + 16 * j, k);
    }
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i)
#pragma unroll
      for (int j = 0; j < WARP_N / 8; ++j) {
        float(&c)[4] = *reinterpret_cast<float(*)[4]>(&d[i][4 * j]);
        mma_f16_16816(c, a[i], b[j / 2][2 * (j & 1)], b[j / 2][2 * (j & 1) + 1]);
      }
  }
}
