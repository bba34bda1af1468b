// Rows of an operand copied to where each begins at a multiple of 128 bytes, for the copy engine: it takes no rows that do not begin
// at a multiple of 16 bytes, and reads rows whose 128 bytes lie in two lines of the cache at half the rate or less. A thread makes
// chunks of 16 bytes, of loads as wide as every row allows; threads that follow each other make chunks that do.
#pragma once
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
using Piece = config::piece;  // what is loaded at once
constexpr int THREADS = config::threads, BATCH = config::batch;
constexpr u32 PIECES = 16 / sizeof(Piece), PER_PIECE = sizeof(Piece) / sizeof(Element);

struct alignas(16) Chunk { Piece piece[PIECES]; };

extern "C" __global__ void __launch_bounds__(THREADS) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  const u32 pieces = (p.k + PER_PIECE - 1) / PER_PIECE, chunks = (pieces + PIECES - 1) / PIECES;
  const u64 total = static_cast<u64>(p.rows) * chunks, stride = static_cast<u64>(gridDim.x) * THREADS;
  for (u64 first = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x; first < total; first += BATCH * stride) {
    // All loads before the first store; beyond the end the last chunk once more.
    Chunk chunk[BATCH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const u64 index = min(first + b * stride, total - 1);
      const u32 row = static_cast<u32>(index / chunks), column = static_cast<u32>(index - static_cast<u64>(row) * chunks) * PIECES;
      const Piece* source = reinterpret_cast<const Piece*>(p.source + row * p.source_stride) + column;
#pragma unroll
      for (int i = 0; i < PIECES; ++i) chunk[b].piece[i] = column + i < pieces ? source[i] : Piece();
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      const u64 index = min(first + b * stride, total - 1);
      const u32 row = static_cast<u32>(index / chunks), column = static_cast<u32>(index - static_cast<u64>(row) * chunks) * PIECES;
      *reinterpret_cast<Chunk*>(reinterpret_cast<Piece*>(p.rows_out + row * p.out_stride) + column) = chunk[b];
    }
  }
  stamp_end(p.stamp);
}
