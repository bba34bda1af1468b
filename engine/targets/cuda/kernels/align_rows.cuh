// Rows of an operand copied to where each begins at a multiple of 128 bytes, for the copy engine: it takes no rows that do not begin
// at a multiple of 16 bytes, and reads rows whose 128 bytes lie in two lines of the cache at half the rate or less. A thread makes
// chunks of 16 bytes, each of the two chunks of memory that it lies across, which neighbouring threads share through the cache, and
// shifts them to where they belong. LANES threads of a block have a row, or a part of it as large as theirs where rows are few (blockIdx.y).
#pragma once
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int THREADS = config::threads, BATCH = config::batch;
constexpr u32 LANES = config::lanes, ROWS = THREADS / LANES;  // of a block at once

// 16 bytes from `source` on, of which `count` are there (more are as many); zeros behind them. Nothing is read but whole chunks in which
// one of these lies.
struct Unaligned {
  uint4 low, high;
  u32 shift, count;
  DEVICE Unaligned() : low(), high(), shift(0), count(0) {}
  DEVICE Unaligned(const u8* source, u32 count) : low(), high(), shift(static_cast<u32>(reinterpret_cast<u64>(source)) & 15), count(count) {
    const uint4* const chunk = reinterpret_cast<const uint4*>(source - shift);
    if (count > 0) low = chunk[0];
    if (count > 0 && shift + min(count, 16u) > 16) high = chunk[1];
  }
  DEVICE uint4 value() const {
    u32 word[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 6; ++i) word[i] = shift & 8 ? word[i + 2] : word[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) word[i] = shift & 4 ? word[i + 1] : word[i];
    u32 made[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      const u64 both = static_cast<u64>(word[i + 1]) << 32 | word[i];
      const u32 left = count > 4 * i ? min(count - 4 * i, 4u) : 0;  // bytes of this word
      made[i] = static_cast<u32>(both >> 8 * (shift & 3)) & static_cast<u32>((static_cast<u64>(1) << 8 * left) - 1);
    }
    return make_uint4(made[0], made[1], made[2], made[3]);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  const u32 bytes = p.k * sizeof(Element), lane = threadIdx.x % LANES, stride = gridDim.x * ROWS;
  for (u32 first = blockIdx.x * ROWS + threadIdx.x / LANES; first < p.rows; first += BATCH * stride)
    for (u32 at = 16 * (LANES * blockIdx.y + lane); at < bytes; at += 16 * LANES * gridDim.y) {
      Unaligned chunk[BATCH];  // all loads before the first store
#pragma unroll
      for (u32 b = 0; b < BATCH; ++b) {
        const u64 row = first + b * static_cast<u64>(stride);
        if (row < p.rows) chunk[b] = Unaligned(reinterpret_cast<const u8*>(p.source + row * p.source_stride) + at, bytes - at);
      }
#pragma unroll
      for (u32 b = 0; b < BATCH; ++b) {
        const u64 row = first + b * static_cast<u64>(stride);
        if (row < p.rows) *reinterpret_cast<uint4*>(reinterpret_cast<u8*>(p.rows_out + row * p.out_stride) + at) = chunk[b].value();
      }
    }
  stamp_end(p.stamp);
}
