// Point-wise expressions and copies whose source has its neighbours along another axis than the result: a square tile is read
// along the source's axis into shared memory, and written along the result's. The prologue's rows are (outer, y), its columns x;
// the epilogue's rows (outer, x), its columns y.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

using Element = config::element_t;
using Value = Prologue::value_t;
constexpr int TILE = 64, CHUNKS = TILE / WIDTH, LINES = config::threads / CHUNKS;
constexpr int PITCH = TILE + 1;  // so that neighbours along y fall into different banks

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  __shared__ Element tile[TILE][PITCH];  // [y][x]
  const u32 chunk = threadIdx.x % CHUNKS * WIDTH, line = threadIdx.x / CHUNKS;
  const u32 tiles_x = (p.size_x + TILE - 1) / TILE, tiles_y = (p.size_y + TILE - 1) / TILE;
  const u32 row_of_tiles = blockIdx.x / tiles_x, outer = row_of_tiles / tiles_y;
  const u32 x0 = (blockIdx.x - row_of_tiles * tiles_x) * TILE, y0 = (row_of_tiles - outer * tiles_y) * TILE;
  {
    const u32 x = x0 + chunk, count = x < p.size_x ? min(static_cast<u32>(WIDTH), p.size_x - x) : 0;
#pragma unroll
    for (int i = 0; i < TILE; i += LINES) {
      const u32 y = y0 + line + i;
      if (y >= p.size_y || count == 0) continue;
      Value v[WIDTH];
      Prologue::load(p, outer * p.size_y + y, x, count, v);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) tile[line + i][chunk + j] = narrow<Element>(v[j]);
    }
  }
  __syncthreads();
  const u32 y = y0 + chunk, count = y < p.size_y ? min(static_cast<u32>(WIDTH), p.size_y - y) : 0;
#pragma unroll
  for (int i = 0; i < TILE; i += LINES) {
    const u32 x = x0 + line + i;
    if (x >= p.size_x || count == 0) continue;
    Value v[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) v[j] = static_cast<Value>(widen(tile[chunk + j][line + i]));
    Epilogue::store(p, outer * p.size_x + x, y, count, v);
  }
  stamp_end(p.stamp);
}
