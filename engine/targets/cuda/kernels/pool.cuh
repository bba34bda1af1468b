// Max and average pooling over windows of any number of axes. A thread computes WIDTH channels of one output pixel where the
// channels are neighbours in memory, else one element; a warp shares one where windows are large and there are few. The window
// is cut to the part inside the image before it is walked. `identity` and the places of the axes come from pool.py.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/group_reduce.cuh"
#include "scheduler/stamp.cuh"

using Operation = config::operation;
using Value = compute_t<config::input_t>;
constexpr int SPATIAL = config::spatial, SHARES = config::shares;
static_assert(WIDTH == 1 || config::channels_inner, "neighbouring columns are channels");

struct Axis { i64 stride; u32 first, last; };  // between taps in memory; the taps inside the image

template <int AXIS, class VISIT> DEVICE void walk(const Axis (&axes)[SPATIAL], i64 offset, const VISIT& visit) {
  if constexpr (AXIS == SPATIAL) {
    visit(offset);
  } else {
    for (u32 tap = axes[AXIS].first; tap < axes[AXIS].last; ++tap) walk<AXIS + 1>(axes, offset + tap * axes[AXIS].stride, visit);
  }
}

DEVICE u32 taps_before(int index, int origin, int dilation, u32 kernel) {
  const int distance = index - origin;
  return distance <= 0 ? 0 : min(kernel, static_cast<u32>((distance + dilation - 1) / dilation));
}

DEVICE void pool(const Params& p, u32 row, u32 column, u32 share, bool inside) {
  // Output places of a row: batch, then the spatial axes (channels inner), or batch, channel and all spatial axes but the last.
  u32 place[SPATIAL], rest = row;
  if constexpr (!config::channels_inner) place[SPATIAL - 1] = column;
#pragma unroll
  for (int i = SPATIAL - (config::channels_inner ? 1 : 2); i >= 0; --i) {
    const u32 size = static_cast<u32>(p.out[i]), outer = rest / size;
    place[i] = rest - outer * size;
    rest = outer;
  }
  i64 offset = 0;
  u32 channel = column;
  if constexpr (config::channels_inner) {
    offset = rest * p.batch_stride;
  } else {
    const u32 batch = rest / p.channels;
    channel = 0;
    offset = batch * p.batch_stride + (rest - batch * p.channels) * p.channel_stride;
  }
  Axis axes[SPATIAL];
  i64 counted = 1, taps = 1;
#pragma unroll
  for (int i = 0; i < SPATIAL; ++i) {
    const int origin = static_cast<int>(place[i] * p.step[i] - p.begin[i]), dilation = static_cast<int>(p.dilation[i]);
    const int size = static_cast<int>(p.size[i]), end = static_cast<int>(p.end[i]);
    const u32 kernel = static_cast<u32>(p.kernel[i]);
    axes[i] = {dilation * p.stride[i], taps_before(0, origin, dilation, kernel), taps_before(size, origin, dilation, kernel)};
    offset += origin * p.stride[i];  // of tap 0, which may lie outside
    taps *= axes[i].last - axes[i].first;
    // Padding counts in an average that includes it; what ceil_mode adds beyond the padding never does.
    if constexpr (config::count_padding) counted *= taps_before(size + end, origin, dilation, kernel);
  }

  const u32 count = config::channels_inner ? min(static_cast<u32>(WIDTH), p.columns - column) : 1;
  Value v[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) v[i] = identity();
  const auto visit = [&](i64 at) {
    const auto x = fetch_columns<config::input_t, Column::UNIT, config::x_vector>(p.x, at, channel, count);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) v[i] = Operation::of(v[i], x[i]);
  };
  if constexpr (SHARES == 1) {
    walk<0>(axes, offset, visit);
  } else {
    for (i64 tap = share; tap < taps; tap += SHARES) {
      i64 left = tap, at = offset;
#pragma unroll
      for (int i = SPATIAL - 1; i >= 0; --i) {
        const u32 size = axes[i].last - axes[i].first, outer = static_cast<u32>(left / size);
        at += (axes[i].first + static_cast<u32>(left - static_cast<i64>(outer) * size)) * axes[i].stride;
        left = outer;
      }
      visit(at);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) v[i] = reduce_group<Operation, SHARES>(v[i]);
  }
  if constexpr (config::mean) {
    const Value scale = Value(1) / static_cast<Value>(config::count_padding ? counted : taps);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) v[i] *= scale;
  }
  if (share == 0 && inside) Epilogue::store(p, row, column, count, v);
}

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 chunks = (p.columns + WIDTH - 1) / WIDTH, total = p.rows * chunks;
  const u32 index = blockIdx.x * (config::threads / SHARES) + threadIdx.x / SHARES;
  const u32 taken = SHARES > 1 ? min(index, total - 1) : index;  // all threads of a warp take part in its shuffles
  if (taken < total) {
    const u32 row = taken / chunks;
    pool(p, row, (taken - row * chunks) * WIDTH, threadIdx.x % SHARES, index < total);
  }
  stamp_end(p.stamp);
}
