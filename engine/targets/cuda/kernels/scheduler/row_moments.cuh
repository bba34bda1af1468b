// What a layer norm multiplies a row by, its factor 1 / √(variance + ε), and what it then subtracts, its offset, the mean times that; from
// the sum of the row and the sum of its squares in fp32. Their difference loses a
// few (mean / σ)² · 2⁻²⁴ of the variance. For means of up to 2¹⁰ deviations that moves a row of 768 by a third at most of what rounding it
// to fp16 does (7 % and 23 % there, 0.006 % and 0.5 % at 30 deviations); beyond, rows of 16 bits hold little but their mean.
//
// The tiles of a product that lie beside each other leave sums of the rows that they share: the warp that comes last with its rows adds
// up all of them, always in the same order, and resets the counter that it found full.
#pragma once
#include "epilogue/math.cuh"
#include "ptx/memory.cuh"

struct RowSums { float sum, squares; };

DEVICE void add(RowSums& row, float x) {
  row.sum += x;
  row.squares = fmaf(x, x, row.squares);
}
// `share`: of a column in a mean; the sums are those of the row less `pivot`. Where they go: `result_factors` and, with OFFSETS,
// `result_offsets` of the parameters.
template <bool OFFSETS, class P> DEVICE void store_factors_if(bool condition, const P& p, u32 row, const RowSums& sums, float share, float pivot = 0) {
  const float mean = sums.sum * share;
  const float factor = inverse_root(max_nan(fmaf(-mean, mean, sums.squares * share), 0.0f) + p.epsilon);
  store_global_4_if(condition, reinterpret_cast<u32*>(p.result_factors + row), __float_as_uint(factor));
  if constexpr (OFFSETS) store_global_4_if(condition, reinterpret_cast<u32*>(p.result_offsets + row), __float_as_uint((pivot + mean) * factor));
}

// By all lanes of a warp that has 16 rows from `first` on, and 16 more 64 rows on where PARTS is 2: `rows` are the sums of its lanes over
// their columns of tile `tile` of `tiles`, of the rows lane / 4 + 8 · i. The parameters: `moments`, tiles × m; `arrived_tiles`, a
// counter for every 16 rows of all tiles, zero before the first run; what `store_factors_if` takes, and m × n, the size of the result.
// Branches are those of a whole warp, and the compiler sees it: else it would keep what products read in ordinary registers.
template <int PARTS, bool OFFSETS, class P>
DEVICE void leave_row_factors(const P& p, RowSums (&rows)[2 * PARTS], u32 first, u32 tile, u32 tiles) {
  const u32 lane = threadIdx.x & 31;
  const float share = 1.0f / static_cast<float>(p.n);
#pragma unroll
  for (int i = 0; i < 2 * PARTS; ++i) {
#pragma unroll
    for (int distance = 1; distance <= 2; distance *= 2) {
      rows[i].sum += __shfl_xor_sync(~0u, rows[i].sum, distance);
      rows[i].squares += __shfl_xor_sync(~0u, rows[i].squares, distance);
    }
    const u32 row = first + lane / 4 + 8 * (i % 2) + 64 * (i / 2);
    const bool stores = lane % 4 == 0 && row < p.m;
    if (tiles == 1) {
      store_factors_if<OFFSETS>(stores, p, row, rows[i], share);
    } else {
      u32* const moments = reinterpret_cast<u32*>(p.moments + static_cast<u64>(tile) * p.m + row);
      store_global_8_if(stores, moments, __float_as_uint(rows[i].sum), __float_as_uint(rows[i].squares));
    }
  }
  if (tiles == 1) return;
  __syncwarp();
  u32 before = 0;
  if (lane == 0) {
    fence_gpu();  // what the warp wrote is visible before it is counted
    before = atomicAdd(p.arrived_tiles + first / 16, 1u);
  }
  if (!__any_sync(~0u, lane == 0 && before == tiles - 1)) return;
  if (lane == 0) {
    fence_gpu();  // the others were counted before what they wrote is read
    p.arrived_tiles[first / 16] = 0;
  }
  __syncwarp();
  const u32 row = first + (lane & 15) + 64 * (lane / 16 % PARTS);
  const float2* part = p.moments + min(row, p.m - 1);
  RowSums all = {0.0f, 0.0f};
#pragma unroll 4
  for (u32 i = 0; i < tiles; ++i, part += p.m) {
    const float2 v = load_global_8(part);
    all.sum += v.x;
    all.squares += v.y;
  }
  store_factors_if<OFFSETS>(row < p.m, p, row, all, share);
}
