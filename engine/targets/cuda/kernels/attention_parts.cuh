// Blocks that share queries, each with a part of the keys: the block that comes last joins what all of them have, always in the same
// order, so a result has the same bits in every run. Included by attention_decode.cuh behind its constants.
// Parameters: `splits`; `partials`, of every tile and part `rows` × VALUE sums; `states`, of every row of these its maximum (in units of
// log2) and the sum of its exponentials, in 16 bytes; `arrived`, a counter for each tile, zero before the first run. A kernel that
// does not divide keys has none of them.
#pragma once
#include "ptx/arithmetic.cuh"
#include "ptx/barrier.cuh"
#include "ptx/memory.cuh"

constexpr int JOINING = 128;  // threads

// This lane's share of part `part` of all tiles' parts: rows `row` and `row` + 8, where they are there.
template <class P>
DEVICE void write_part(const P& p, const float (&out)[VALUE / 2], const float (&maximum)[2], const float (&sum)[2], u32 part, u32 row) {
  const u32 quad = threadIdx.x & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool present = row + 8 * h < p.rows;
    const u64 at = static_cast<u64>(part) * p.rows + row + 8 * h;
    u32* const to = reinterpret_cast<u32*>(p.partials + at * VALUE + 2 * quad);
#pragma unroll
    for (int j = 0; j < VALUE / 8; ++j)
      store_global_8_if(present, to + 8 * j, __float_as_uint(out[4 * j + 2 * h]), __float_as_uint(out[4 * j + 2 * h + 1]));
    if (present && quad == 0) store_global_16(p.states + 4 * at, make_float4(maximum[h], sum[h], 0.0f, 0.0f));
  }
}

// Whether this block is the last of those that share tile `tile`. What the others left is visible to it. `word` is in shared memory.
template <class P> DEVICE bool joins(const P& p, u32 tile, u32* word) {
  meet_at<JOINING>(1);
  if (threadIdx.x == 0) {
    fence_gpu();  // what the block wrote is visible before it is counted
    const u32 before = atomicAdd(p.arrived + tile, 1u);
    fence_gpu();  // the others were counted before what they wrote is read
    if (before == p.splits - 1) p.arrived[tile] = 0;  // as the next run finds it
    *word = before;
  }
  meet_at<JOINING>(1);
  return *word == p.splits - 1;
}

// The results of tile `tile`, of all its parts. `scratch`: room for two floats of every part and row. Called by JOINING threads.
template <class P> DEVICE void join_parts(const P& p, float* scratch, u32 tile) {
  constexpr int PIECES = VALUE / 8, BATCH = 8;  // loads of 32 bytes of a thread under way at once
  const u32 states = p.splits * p.rows, lane = threadIdx.x & 31, first_row = tile * p.rows;
  const u64 first = static_cast<u64>(tile) * states;
  float* const weights = scratch;  // maxima, to begin with
  float* const sums = scratch + states;
#pragma unroll 4
  for (u32 i = threadIdx.x; i < states; i += JOINING) {
    const float4 state = load_global_16(p.states + 4 * (first + i));
    weights[i] = state.x;
    sums[i] = state.y;
  }
  meet_at<JOINING>(1);
#pragma unroll 1
  for (u32 row = threadIdx.x / 32; row < p.rows; row += JOINING / 32) {
    float highest = -INFINITY, total = 0.0f;
    for (u32 i = lane * p.rows + row; i < states; i += 32 * p.rows) highest = fmaxf(highest, weights[i]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, distance));
    if (highest == -INFINITY) highest = 0.0f;  // no key is left of any part: every weight is then 0, not NaN
    for (u32 i = lane * p.rows + row; i < states; i += 32 * p.rows) {
      weights[i] = exp2_approx(weights[i] - highest);
      total = fmaf(weights[i], sums[i], total);
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
    const float scale = config::masked_rows_zero && total == 0.0f ? 0.0f : 1.0f / total;
    for (u32 i = lane * p.rows + row; i < states; i += 32 * p.rows) weights[i] *= scale;
  }
  meet_at<JOINING>(1);
#pragma unroll 1
  for (u32 i = threadIdx.x; i < p.rows * PIECES; i += JOINING) {
    const u32 row = i / PIECES, column = 8 * (i % PIECES);
    if (column >= p.value_size) continue;
    const float* const from = p.partials + (first + row) * VALUE + column;
    float v[8] = {};
#pragma unroll 1
    for (u32 s = 0; s < p.splits; s += BATCH) {
      float4 low[BATCH], high[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        const float* const part = from + static_cast<u64>(min(s + b, p.splits - 1)) * p.rows * VALUE;
        low[b] = load_global_16(part);
        high[b] = load_global_16(part + 4);
      }
#pragma unroll
      for (int b = 0; b < BATCH; ++b) {
        if (s + b >= p.splits) break;
        const float weight = weights[(s + b) * p.rows + row];
        const float of_part[8] = {low[b].x, low[b].y, low[b].z, low[b].w, high[b].x, high[b].y, high[b].z, high[b].w};
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = fmaf(weight, of_part[j], v[j]);
      }
    }
    Epilogue::store(p, first_row + row, column, min(8u, p.value_size - column), v);
  }
}
