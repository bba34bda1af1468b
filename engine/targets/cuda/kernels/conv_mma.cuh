// Convolution as an implicit matrix product on mma.sync: rows are output pixels (image, y, x), columns output channels, k runs
// over (kernel row, kernel column, input channel). Patches are gathered into shared memory by cp.async; im2col never exists.
// w is packed [group, output channel, k] with rows of `w_stride` halves. x_vector: x is NHWC in halves, with channels per group,
// strides and offset in multiples of 8. Without it x has any strides and may be fp32 (a model's image input): elements are read
// one by one and rounded on the way.
#pragma once
#include "epilogue/fragment.cuh"
#include "mma/tile.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"
#include "scheduler/tiles.cuh"

constexpr int TILE_M = config::tile_m, TILE_N = config::tile_n, TILE_K = config::tile_k_bytes / 2, STAGES = config::stages;
constexpr int WARPS_M = config::warps_m, WARPS_N = config::warps_n, THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;

constexpr int ROW_BYTES = TILE_K * 2, CHUNKS = TILE_K / 8, ROWS_PER_PASS = THREADS / CHUNKS;
constexpr int A_PASSES = TILE_M / ROWS_PER_PASS, B_PASSES = (TILE_N + ROWS_PER_PASS - 1) / ROWS_PER_PASS;
constexpr int A_BYTES = TILE_M * ROW_BYTES, B_BYTES = TILE_N * ROW_BYTES, STAGE_BYTES = A_BYTES + B_BYTES;
static_assert(WARP_M % 16 == 0 && WARP_N % 32 == 0, "a warp's tile is made of 16×32 fragments");
static_assert(THREADS % CHUNKS == 0 && TILE_M % ROWS_PER_PASS == 0, "every thread gathers whole rows in its column of chunks");
static_assert(STAGES * STAGE_BYTES == config::shared_bytes, "the host asks for the shared memory that the ring needs");

// Where in k a thread's chunk stands. Advancing by additions spares a division for every chunk.
struct Tap {
  u32 r, s, channel;
  DEVICE void advance(u32 by, u32 channels, u32 kernel_w) {
    channel += by;
    while (channel >= channels) {
      channel -= channels;
      if (++s == kernel_w) { s = 0; ++r; }
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 ring = shared_address(shared);
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 rows = p.images * p.out_h * p.out_w, group = blockIdx.y;
  const TileIndex tile = tile_of<8>(blockIdx.x, (rows + TILE_M - 1) / TILE_M, (p.n + TILE_N - 1) / TILE_N);
  const u32 row0 = tile.m * TILE_M, column0 = tile.n * TILE_N;
  const u32 chunk = threadIdx.x % CHUNKS, local_row = threadIdx.x / CHUNKS;
  const config::x_t* x = p.x + group * p.channels * p.x_channel;
  const half* w = p.w + static_cast<i64>(group) * p.n * p.w_stride;

  // The pixels whose patches this thread gathers: upper left corner in the input (may lie outside) and its image.
  int corner_y[A_PASSES], corner_x[A_PASSES];
  const config::x_t* image[A_PASSES];
#pragma unroll
  for (int i = 0; i < A_PASSES; ++i) {
    const u32 row = row0 + i * ROWS_PER_PASS + local_row, y = row / p.out_w, n = y / p.out_h;
    corner_x[i] = static_cast<int>((row - y * p.out_w) * p.stride_w) - p.pad_w;
    // A row past the end is given a corner that no kernel position brings inside.
    corner_y[i] = row < rows ? static_cast<int>((y - n * p.out_h) * p.stride_h) - p.pad_h : -(1 << 24);
    image[i] = x + n * p.x_image;
  }

  Tap tap{0, 0, 0};
  tap.advance(8 * chunk, p.channels, p.kernel_w);
  u32 k = 8 * chunk;
  const auto copy_stage = [&](u32 stage_index) {
    const u32 stage = ring + stage_index * STAGE_BYTES;
#pragma unroll
    for (int i = 0; i < A_PASSES; ++i) {
      const u32 destination = stage + swizzled<ROW_BYTES>(i * ROWS_PER_PASS + local_row, chunk);
      if constexpr (config::x_vector) {
        const int y = corner_y[i] + static_cast<int>(tap.r * p.dilation_h), xx = corner_x[i] + static_cast<int>(tap.s * p.dilation_w);
        const bool inside = k < p.k && static_cast<u32>(y) < p.in_h && static_cast<u32>(xx) < p.in_w;
        copy_async_16(destination, image[i] + y * p.x_row + xx * p.x_pixel + tap.channel, inside);
      } else {
        u32 packed[4];
        Tap t = tap;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int y = corner_y[i] + static_cast<int>(t.r * p.dilation_h), xx = corner_x[i] + static_cast<int>(t.s * p.dilation_w);
          const bool inside = k + j < p.k && static_cast<u32>(y) < p.in_h && static_cast<u32>(xx) < p.in_w;
          const u32 bits = inside ? narrow<half>(widen(image[i][y * p.x_row + xx * p.x_pixel + t.channel * p.x_channel])).bits : 0;
          packed[j / 2] = j & 1 ? packed[j / 2] | bits << 16 : bits;
          t.advance(1, p.channels, p.kernel_w);
        }
        store_shared_16(destination, make_uint4(packed[0], packed[1], packed[2], packed[3]));
      }
    }
#pragma unroll
    for (int i = 0; i < B_PASSES; ++i) {
      const u32 local = i * ROWS_PER_PASS + local_row, column = column0 + local;
      if (TILE_N % ROWS_PER_PASS != 0 && local >= TILE_N) break;
      copy_async_16(stage + A_BYTES + swizzled<ROW_BYTES>(local, chunk), w + column * p.w_stride + k, column < p.n && k < p.w_stride);
    }
    k += TILE_K;
    tap.advance(TILE_K, p.channels, p.kernel_w);
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
    if (step + STAGES - 1 < steps) copy_stage((step + STAGES - 1) % STAGES);
    copy_async_commit();
    const u32 stage = ring + (step % STAGES) * STAGE_BYTES;
    multiply_stage<MmaOperand<half>, WARP_M, WARP_N, TILE_K, true, ROW_BYTES, true, ROW_BYTES>(d, stage, stage + A_BYTES, warp_row, warp_column);
  }

  // Columns of the iteration space are channels of the whole tensor: this group's begin at group · n.
  const u32 lane = threadIdx.x & 31, column_base = group * p.n;
#pragma unroll
  for (int i = 0; i < WARP_M / 16; ++i)
    emit_fragment<Epilogue, WARP_N / 8>(p, d[i], 0, row0 + warp_row + 16 * i + lane / 4, rows, column_base + column0 + warp_column, column_base + p.n);
  stamp_end(p.stamp);
}
