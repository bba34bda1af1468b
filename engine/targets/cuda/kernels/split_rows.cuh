// Rows of fp32 in two parts of bf16 that keep 16 bits, for gemm_wgmma.cuh: of every 64 columns the nearest numbers, then the nearest
// ones to what these leave; columns beyond the last are zeros. A thread makes eight columns of both, of loads as wide as every row
// allows; threads that follow each other make columns that do.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/grid.cuh"
#include "ptx/pack.cuh"
#include "scheduler/stamp.cuh"

using Piece = config::piece;  // what is loaded at once
constexpr int THREADS = config::threads, COLUMNS = 64, EIGHT = 8;
constexpr u32 PER_PIECE = sizeof(Piece) / sizeof(float);

struct alignas(16) Columns { Piece piece[EIGHT / PER_PIECE]; };
struct alignas(16) Pairs { u32 pair[EIGHT / 2]; };

// What the nearest number of bf16 leaves of x; nothing where there is none that is finite.
DEVICE float rest_of(float x) {
  const float rest = x - to_float(to_bfloat16(x));
  return rest == rest ? rest : 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  const u32 eights = (p.k + COLUMNS - 1) / COLUMNS * (COLUMNS / EIGHT);
  const u64 total = static_cast<u64>(p.rows) * eights, stride = static_cast<u64>(gridDim.x) * THREADS;
  for (u64 index = static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x; index < total; index += stride) {
    const u32 row = static_cast<u32>(index / eights), column = static_cast<u32>(index - static_cast<u64>(row) * eights) * EIGHT;
    const float* source = p.source + row * p.source_stride + column;
    Columns columns;
#pragma unroll
    for (u32 i = 0; i < EIGHT / PER_PIECE; ++i)
      columns.piece[i] = column + i * PER_PIECE < p.k ? reinterpret_cast<const Piece*>(source)[i] : Piece();
    const float* x = reinterpret_cast<const float*>(&columns);
    Pairs big, small;
#pragma unroll
    for (int i = 0; i < EIGHT / 2; ++i) {
      big.pair[i] = pack_pair<bfloat16>(x[2 * i], x[2 * i + 1]);
      small.pair[i] = pack_pair<bfloat16>(rest_of(x[2 * i]), rest_of(x[2 * i + 1]));
    }
    bfloat16* destination = p.rows_out + row * p.out_stride + column / COLUMNS * (2 * COLUMNS) + column % COLUMNS;
    *reinterpret_cast<Pairs*>(destination) = big;
    *reinterpret_cast<Pairs*>(destination + COLUMNS) = small;
  }
  stamp_end(p.stamp);
}
