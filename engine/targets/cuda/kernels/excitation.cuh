// The two layers of a squeeze-and-excite block: x[image][channels] · w1 → hidden → · w2 → stores. They have thousands of products each
// and one cannot begin before the other ends, so a launch for each would cost more than either.
//
// A block has IMAGES images and `vectors` vectors of eight outputs of theirs; blocks of the same images compute the hidden layer each for
// itself. First layer: a warp a row of w1, lanes along the channels. Second one: threads are `groups` × `vectors`; groups share the
// hidden units, and what they find is added up in shared memory in their order. Sums in fp32; the hidden layer is not rounded.
//
// x may come in parts, as sums over the pixels of an image (epilogue/image_sums.cuh): [image][slot][channels], whose mean is meant.
//
// Weights are constants and asked for before the kernel before this one has ended: as many loads of a thread as it has registers for.
// w1 is packed [hidden][channels], w2 [hidden][outputs].
#pragma once
#include "epilogue/access.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int THREADS = config::threads, WARPS = THREADS / 32, IMAGES = config::images;
constexpr u32 BATCH = IMAGES == 1 ? 8 : 4;  // loads of a thread under way, in each layer
using Vector = Pack<Element>;
static_assert(WIDTH == 8, "channels come in vectors of eight");

// The loads of the first layer, as a warp goes through them: `pieces` of 32 vectors for each of its rows.
struct Walk {
  u32 pieces, total;
  DEVICE explicit Walk(const Params& p)
      : pieces((p.channels / 8 + 31) / 32), total(threadIdx.x / 32 < p.hidden ? (p.hidden - threadIdx.x / 32 + WARPS - 1) / WARPS * pieces : 0) {}
  DEVICE u32 row(u32 i) const { return threadIdx.x / 32 + i / pieces * WARPS; }
  DEVICE u32 vector(u32 i) const { return threadIdx.x % 32 + i % pieces * 32; }
  DEVICE void load(const Params& p, u32 first, Vector (&w)[BATCH]) const {
#pragma unroll
    for (u32 b = 0; b < BATCH; ++b)  // within the matrix rather than around what lies beyond
      w[b] = reinterpret_cast<const Vector*>(p.w1)[min(row(first + b), p.hidden - 1) * (p.channels / 8) + min(vector(first + b), p.channels / 8 - 1)];
  }
};

DEVICE void load_second(const Params& p, u32 unit, u32 vector, Vector (&w)[BATCH]) {
#pragma unroll
  for (u32 b = 0; b < BATCH; ++b)
    w[b] = reinterpret_cast<const Vector*>(p.w2)[min(unit + b * p.groups, p.hidden - 1) * (p.outputs / 8) + min(vector, p.outputs / 8 - 1)];
}

DEVICE Pack<config::x_t> load_x(const config::x_t* x) {
  if constexpr (config::x_vector) {
    return *reinterpret_cast<const Pack<config::x_t>*>(x);
  } else {
    Pack<config::x_t> read;
#pragma unroll
    for (int j = 0; j < 8; ++j) read.element[j] = x[j];
    return read;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 padded = (p.hidden + 7) / 8 * 8, columns = 8 * p.vectors;
  float* const x = reinterpret_cast<float*>(shared);    // [IMAGES][channels]
  float* const hidden = x + IMAGES * p.channels;        // [IMAGES][padded]
  float* const partial = hidden + IMAGES * padded;      // [IMAGES][shares][channels], then [IMAGES][groups][columns]
  const u32 lane = threadIdx.x % 32, image0 = blockIdx.y * IMAGES;
  const u32 group = threadIdx.x / p.vectors, own = threadIdx.x - group * p.vectors, vector = blockIdx.x * p.vectors + own;
  let_next_kernel_start();
  const Walk walk(p);
  Vector first_weights[BATCH], second_weights[BATCH];
  walk.load(p, 0, first_weights);
  load_second(p, group, vector, second_weights);
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  // x: sums over `slots`, which `shares` threads of a vector of channels divide, over `count`.
  const u32 chunks = p.channels / 8, share = threadIdx.x / chunks, chunk = threadIdx.x - share * chunks;
  if (share < p.shares) {
#pragma unroll
    for (int image = 0; image < IMAGES; ++image) {
      const config::x_t* const source = p.x + (image0 + image < p.images ? image0 + image : 0) * p.x_image + 8 * chunk;
      float whole[8] = {};
      for (u32 first = share; first < p.slots; first += BATCH / 2 * p.shares) {
        Pack<config::x_t> read[BATCH / 2];
#pragma unroll
        for (u32 b = 0; b < BATCH / 2; ++b) read[b] = load_x(source + min(first + b * p.shares, p.slots - 1) * p.x_slot);
#pragma unroll
        for (u32 b = 0; b < BATCH / 2; ++b) {
          if (first + b * p.shares >= p.slots) break;
#pragma unroll
          for (int j = 0; j < 8; ++j) whole[j] += widen(read[b].element[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) partial[(image * p.shares + share) * p.channels + 8 * chunk + j] = whole[j];
    }
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < IMAGES * p.channels; i += THREADS) {
    const u32 image = i / p.channels;
    const float* const column = partial + image * p.shares * p.channels + (i - image * p.channels);
    float whole = column[0];
    for (u32 s = 1; s < p.shares; ++s) whole += column[s * p.channels];
    x[i] = whole / p.count;
  }
  __syncthreads();

  float sum[IMAGES] = {};
  for (u32 first = 0; first < walk.total; first += BATCH) {
    if (first > 0) walk.load(p, first, first_weights);
#pragma unroll
    for (u32 b = 0; b < BATCH; ++b) {
      const u32 i = first + b, at = walk.vector(i);
      if (i >= walk.total) break;
      if (at < chunks) {
#pragma unroll
        for (int image = 0; image < IMAGES; ++image)
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[image] = fmaf(widen(first_weights[b].element[j]), x[image * p.channels + 8 * at + j], sum[image]);
      }
      if (i % walk.pieces == walk.pieces - 1) {  // the end of a row
#pragma unroll
        for (int image = 0; image < IMAGES; ++image) {
          float whole = sum[image];
          for (int distance = 16; distance > 0; distance /= 2) whole += __shfl_xor_sync(~0u, whole, distance);
          if (lane == 0) hidden[image * padded + walk.row(i)] = whole;
          sum[image] = 0.0f;
        }
      }
    }
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < IMAGES * padded / 8; i += THREADS) {
    const u32 unit = i % (padded / 8) * 8;
    float sums[8], value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) sums[j] = unit + j < p.hidden ? hidden[8 * i + j] : 0.0f;
    Hidden::of(p, unit, min(8u, p.hidden - unit), sums, value);
#pragma unroll
    for (int j = 0; j < 8; ++j) hidden[8 * i + j] = value[j];
  }
  __syncthreads();

  float total[IMAGES][8] = {};
  for (u32 first = group; group < p.groups && first < p.hidden; first += BATCH * p.groups) {
    if (first > group) load_second(p, first, vector, second_weights);
#pragma unroll
    for (u32 b = 0; b < BATCH; ++b) {
      const u32 unit = first + b * p.groups;
      if (unit >= p.hidden) break;
#pragma unroll
      for (int image = 0; image < IMAGES; ++image)
#pragma unroll
        for (int j = 0; j < 8; ++j) total[image][j] = fmaf(widen(second_weights[b].element[j]), hidden[image * padded + unit], total[image][j]);
    }
  }
  if (group < p.groups) {
#pragma unroll
    for (int image = 0; image < IMAGES; ++image)
#pragma unroll
      for (int j = 0; j < 8; ++j) partial[(image * p.groups + group) * columns + 8 * own + j] = total[image][j];
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < IMAGES * columns; i += THREADS) {
    const u32 image = i / columns;
    float* const column = partial + image * p.groups * columns + (i - image * columns);
    float whole = column[0];
    for (u32 g = 1; g < p.groups; ++g) whole += column[g * columns];
    column[0] = whole;
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < IMAGES * p.vectors; i += THREADS) {
    const u32 image = i / p.vectors, part = i - image * p.vectors, output = 8 * (blockIdx.x * p.vectors + part);
    if (image0 + image >= p.images || output >= p.outputs) continue;
    float value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) value[j] = partial[image * p.groups * columns + 8 * part + j];
    Epilogue::store(p, image0 + image, output, 8, value);
  }
  stamp_end(p.stamp);
}
