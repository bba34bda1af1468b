// Convolution as an implicit matrix product on mma.sync: rows are output pixels (image, z, y, x), columns output channels, k runs
// over (kernel position, input channel). Patches are gathered into shared memory by cp.async; im2col never exists. w is packed
// [group, output channel, k] with rows of `w_stride` elements. Operands are fp16, bf16 or fp32 (rounded to tf32, or `exact`).
// config: x_vector: x lies in the operand's type with channels innermost, its channels per group, strides and offset whole 16-byte
// chunks (else x has any strides, may be fp32 beside 16-bit weights, and elements are read one by one, rounded on the way);
// depth: three spatial axes, not two; phased: a transposed convolution, one of its phases a block (conv_geometry.cuh); split: several
// blocks share the k of a tile. The grid is tiles × groups × (phases · splits).
#pragma once
#include "conv_geometry.cuh"
#include "epilogue/fragment.cuh"
#include "mma/tile.cuh"
#include "ptx/grid.cuh"
#include "scheduler/split_k.cuh"
#include "scheduler/stamp.cuh"
#include "scheduler/tiles.cuh"

using Operand = MmaOperand<config::operand, config::exact>;
using Element = Operand::Element;
constexpr int ROW_BYTES = config::tile_k_bytes, PER_CHUNK = Operand::PER_CHUNK, TILE_K = ROW_BYTES / sizeof(Element);
constexpr int TILE_M = config::tile_m, TILE_N = config::tile_n, STAGES = config::stages;
constexpr int WARPS_M = config::warps_m, WARPS_N = config::warps_n, THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_M = TILE_M / WARPS_M, WARP_N = TILE_N / WARPS_N;
constexpr bool DEPTH = config::depth, PHASED = config::phased, SPLIT = config::split;

constexpr int CHUNKS = ROW_BYTES / 16, ROWS_PER_PASS = THREADS / CHUNKS;
constexpr int A_PASSES = TILE_M / ROWS_PER_PASS, B_PASSES = (TILE_N + ROWS_PER_PASS - 1) / ROWS_PER_PASS;
constexpr int A_BYTES = TILE_M * ROW_BYTES, B_BYTES = TILE_N * ROW_BYTES, STAGE_BYTES = A_BYTES + B_BYTES;
static_assert(WARP_M % 16 == 0 && WARP_N % 32 == 0, "a warp's tile is made of 16×32 fragments");
static_assert(THREADS % CHUNKS == 0 && TILE_M % ROWS_PER_PASS == 0, "every thread gathers whole rows in its column of chunks");
static_assert(STAGES * STAGE_BYTES == config::shared_bytes, "the host asks for the shared memory that the ring needs");

// What differs between the phases of a transposed convolution; another one has a single phase, its arguments.
struct Window {
  u32 out_d, out_h, out_w, kernel_h, kernel_w, k, w_stride;
  int pad_d, pad_h, pad_w;
  const Element* w;
};

template <class PARAMS> DEVICE Window window_of(const PARAMS& p) {
  if constexpr (PHASED) {
    const Phase& f = p.phases[blockIdx.z / splits_of<SPLIT>(p)];
    return {f.out[0], f.out[1], f.out[2], f.kernel[1], f.kernel[2], f.k, f.w_stride, f.pad[0], f.pad[1], f.pad[2], p.w + f.w};
  } else {
    return {p.out_d, p.out_h, p.out_w, p.kernel_h, p.kernel_w, p.k, p.w_stride, p.pad_d, p.pad_h, p.pad_w, p.w};
  }
}

// The bits of an element as an operand of 16 bits.
template <class T, class X> DEVICE u32 narrow_bits(X x) {
  if constexpr (sizeof(T) == 2) return narrow<T>(widen(x)).bits;
  else return 0;
}

struct Pixel { u32 image, z, y, x; };

DEVICE Pixel pixel_of(const Window& window, u32 row) {
  const u32 line = row / window.out_w, plane = line / window.out_h, image = DEPTH ? plane / window.out_d : plane;
  return {image, plane - image * window.out_d, line - plane * window.out_h, row - line * window.out_w};
}

// The epilogue for the rows of this block's phase.
struct PhaseEpilogue {
  using Inputs = Epilogue::Inputs;
  using Carries = Epilogue::Carries;
  using Rows = Epilogue::Rows;
  using Targets = Epilogue::Targets;
  static constexpr bool SHIFTED = Epilogue::SHIFTED, ROUNDS = false;
  template <class PARAMS> DEVICE static u32 place(const PARAMS& p, u32 row) {
    if constexpr (PHASED) {
      const Phase& f = p.phases[blockIdx.z / splits_of<SPLIT>(p)];
      const Pixel at = pixel_of(window_of(p), row);
      const u32 z = f.start[0] + at.z * p.step_d, y = f.start[1] + at.y * p.step_h, x = f.start[2] + at.x * p.step_w;
      return ((at.image * p.out_d + z) * p.out_h + y) * p.out_w + x;
    } else {
      return row;
    }
  }
  DEVICE static Rows at(const Params& p, u32 row) { return Epilogue::at(p, place(p, row)); }
  DEVICE static Targets to(const Params& p, u32 row) { return Epilogue::to(p, place(p, row)); }
  DEVICE static Inputs fetch(const Params& p, const Rows& rows, u32 column, u32 count) { return Epilogue::fetch(p, rows, column, count); }
  DEVICE static void store(const Params& p, const Targets& targets, u32 column, u32 count, const float (&acc)[8], const Inputs& inputs) {
    Epilogue::store(p, targets, column, count, acc, inputs);
  }
  template <int N, class EPILOGUE = Epilogue>  // which has these only where results are not aligned
  DEVICE static void store_shifted(const Params& p, u32 row, u32 column, u32 first, u32 end, bool present, Along at, const float (&acc)[N],
                                   const Inputs& inputs, Carries& carries) {
    EPILOGUE::store_shifted(p, place(p, row), column, first, end, present, at, acc, inputs, carries);
  }
  template <int N, class EPILOGUE = Epilogue>
  DEVICE static void store_rest(const Params& p, u32 row, u32 column, u32 first, u32 end, bool present, Carries& carries) {
    EPILOGUE::template store_rest<N>(p, place(p, row), column, first, end, present, carries);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 ring = shared_address(shared);
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const Window window = window_of(p);
  const u32 rows = p.images * window.out_d * window.out_h * window.out_w, group = blockIdx.y;
  const u32 tiles_m = (rows + TILE_M - 1) / TILE_M, tiles_n = (p.n + TILE_N - 1) / TILE_N;
  if (!PHASED || blockIdx.x < tiles_m * tiles_n) {  // phases differ in size
    const TileIndex tile = tile_of<8>(blockIdx.x, tiles_m, tiles_n);
    const u32 row0 = tile.m * TILE_M, column0 = tile.n * TILE_N;
    const u32 chunk = threadIdx.x % CHUNKS, local_row = threadIdx.x / CHUNKS;
    const config::x_t* x = p.x + static_cast<i64>(group) * p.channels * p.x_channel;
    const Element* w = window.w + static_cast<i64>(group) * p.n * window.w_stride;

    // The pixels whose patches this thread gathers: first corner in the input (may lie outside) and its image.
    int corner_z[A_PASSES], corner_y[A_PASSES], corner_x[A_PASSES];
    const config::x_t* image[A_PASSES];
#pragma unroll
    for (int i = 0; i < A_PASSES; ++i) {
      const u32 row = row0 + i * ROWS_PER_PASS + local_row;
      const Pixel at = pixel_of(window, row);
      corner_z[i] = DEPTH ? static_cast<int>(at.z * p.stride_d) - window.pad_d : 0;
      // A row past the end is given a corner that no kernel position brings inside.
      corner_y[i] = row < rows ? static_cast<int>(at.y * p.stride_h) - window.pad_h : -(1 << 28);
      corner_x[i] = static_cast<int>(at.x * p.stride_w) - window.pad_w;
      image[i] = x + at.image * p.x_image;
    }
    // Whether an element of a patch lies in the input, and its offset from the image there.
    const auto is_inside = [&](int i, const Tap<DEPTH>& tap, u32 k, i64& offset) {
      const int z = corner_z[i] + static_cast<int>(tap.q * p.dilation_d), y = corner_y[i] + static_cast<int>(tap.r * p.dilation_h);
      const int xx = corner_x[i] + static_cast<int>(tap.s * p.dilation_w);
      offset = y * p.x_row + xx * p.x_pixel + (config::x_vector ? tap.channel : tap.channel * p.x_channel);
      if constexpr (DEPTH) offset += z * p.x_depth;
      const bool inside = k < window.k && static_cast<u32>(y) < p.in_h && static_cast<u32>(xx) < p.in_w;
      return DEPTH ? inside && static_cast<u32>(z) < p.in_d : inside;
    };

    // The blocks that share a tile take as many steps each; beyond k they find zeros.
    const u32 splits = splits_of<SPLIT>(p), split = SPLIT ? blockIdx.z % splits : 0;
    const u32 steps = ((window.k + TILE_K - 1) / TILE_K + splits - 1) / splits;
    u32 k = split * steps * TILE_K + PER_CHUNK * chunk;
    Tap<DEPTH> tap = Tap<DEPTH>::at(k, p.channels, window.kernel_h, window.kernel_w);
    const auto copy_stage = [&](u32 stage_index) {
      const u32 stage = ring + stage_index * STAGE_BYTES;
#pragma unroll
      for (int i = 0; i < A_PASSES; ++i) {
        const u32 destination = stage + swizzled<ROW_BYTES>(i * ROWS_PER_PASS + local_row, chunk);
        i64 offset;
        if constexpr (config::x_vector) {
          const bool inside = is_inside(i, tap, k, offset);
          copy_async_16(destination, image[i] + offset, inside);
        } else {
          Tap<DEPTH> t = tap;
          u32 packed[4];
#pragma unroll
          for (int j = 0; j < PER_CHUNK; ++j) {
            const bool inside = is_inside(i, t, k + j, offset);
            if constexpr (PER_CHUNK == 4) {
              copy_async_4(destination + 4 * j, image[i] + offset, inside);
            } else {
              const u32 bits = inside ? narrow_bits<Element>(image[i][offset]) : 0;
              packed[j / 2] = j & 1 ? packed[j / 2] | bits << 16 : bits;
            }
            t.advance(1, p.channels, window.kernel_h, window.kernel_w);
          }
          if constexpr (PER_CHUNK == 8) store_shared_16(destination, make_uint4(packed[0], packed[1], packed[2], packed[3]));
        }
      }
#pragma unroll
      for (int i = 0; i < B_PASSES; ++i) {
        const u32 local = i * ROWS_PER_PASS + local_row, column = column0 + local;
        if (TILE_N % ROWS_PER_PASS != 0 && local >= TILE_N) break;
        const Element* source = w + static_cast<i64>(column) * window.w_stride + k;
        copy_async_16(stage + A_BYTES + swizzled<ROW_BYTES>(local, chunk), source, column < p.n && k < window.w_stride);
      }
      k += TILE_K;
      tap.advance(TILE_K, p.channels, window.kernel_h, window.kernel_w);
    };

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
      multiply_stage<Operand, WARP_M, WARP_N, TILE_K, true, ROW_BYTES, true, ROW_BYTES>(d, stage, stage + A_BYTES, warp_row, warp_column);
    }

    // Columns of the iteration space are channels of the whole tensor: this group's begin at group · n.
    const u32 lane = threadIdx.x & 31, column_base = group * p.n;
    const u32 fragment = ((blockIdx.z / splits * gridDim.y + group) * gridDim.x + blockIdx.x) * (THREADS / 32) + warp;
    if (add_splits<SPLIT>(p, d, fragment, split)) {
      constexpr int AHEAD = sizeof(Epilogue::Inputs) > 16 ? 1 : WARP_N / 16;  // a bias and a residual leave no registers for the next ones
#pragma unroll
      for (int i = 0; i < WARP_M / 16; ++i)
        emit_fragment<PhaseEpilogue, WARP_N / 8, AHEAD>(
            p, d[i], 0, row0 + warp_row + 16 * i + lane / 4, rows, column_base + column0 + warp_column, column_base + p.n);
    }
  }
  stamp_end(p.stamp);
}
