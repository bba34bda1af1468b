// Convolution on the ordinary arithmetic units, for what neither the matrix units nor the kernels for images and depthwise
// filters take: fp64, groups too small for a matrix tile, filters of any size and number of axes, transposed or not, weights
// that another kernel has just computed. A thread computes WIDTH channels of one output pixel; neighbouring threads take
// neighbouring channels. Element (group, column, channel, tap) of w lies at the strides given; x has any strides.
// config: sum_t is what products are summed in; `depthwise`: groups of one channel in and one out, so that WIDTH columns are
// WIDTH groups (else they belong to one); x_vector, w_vector: a thread's WIDTH elements are one aligned run.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

using Sum = config::sum_t;

// The taps that reach an output along one axis: `tap` and every `tap_step` after it; the first reads input `position`, the
// others `move` further each (back, in a transposed convolution).
struct Walk {
  u32 tap;
  int position;
};
constexpr int DIRECTION = config::transposed ? -1 : 1;

DEVICE Walk walk_from(u32 out, u32 stride, int pad, u32 dilation, u32 kernel, u32 tap_step) {
  if constexpr (!config::transposed) return {0, static_cast<int>(out * stride) - pad};
  // Input i meets output o by tap k where o + pad = i · stride + k · dilation. One of `tap_step` neighbouring taps may.
  const int ahead = static_cast<int>(out) + pad, step = static_cast<int>(stride);
  for (u32 tap = 0; tap < tap_step; ++tap) {
    const int rest = ahead - static_cast<int>(tap * dilation);
    if (rest % step == 0) return {tap, rest / step};
  }
  return {kernel, 0};
}

template <class T, bool VECTOR> DEVICE Pack<T> read(const T* p, i64 stride) {
  if constexpr (VECTOR) return *reinterpret_cast<const Pack<T>*>(p);
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) pack.element[i] = p[i * stride];
  return pack;
}

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 chunks = p.groups * p.n / WIDTH, pixels = p.images * p.out_d * p.out_h * p.out_w;
  const u64 index = static_cast<u64>(blockIdx.x) * config::threads + threadIdx.x;
  const u32 row = static_cast<u32>(index / chunks), column = static_cast<u32>(index - static_cast<u64>(row) * chunks) * WIDTH;
  if (index < static_cast<u64>(chunks) * pixels) {
    const u32 line = row / p.out_w, plane = line / p.out_h, image = plane / p.out_d, group = column / p.n;
    const Walk d = walk_from(plane - image * p.out_d, p.stride_d, p.pad_d, p.dilation_d, p.kernel_d, p.tap_step_d);
    const Walk h = walk_from(line - plane * p.out_h, p.stride_h, p.pad_h, p.dilation_h, p.kernel_h, p.tap_step_h);
    const Walk w = walk_from(row - line * p.out_w, p.stride_w, p.pad_w, p.dilation_w, p.kernel_w, p.tap_step_w);
    const config::x_t* x = p.x + image * p.x_image + static_cast<i64>(group) * p.channels * p.x_channel;
    const config::w_t* filter = p.w + group * p.w_group + (column - group * p.n) * p.w_column;

    Sum sum[WIDTH] = {};
    int z = d.position;
    for (u32 q = d.tap; q < p.kernel_d; q += p.tap_step_d, z += DIRECTION * static_cast<int>(p.move_d)) {
      if (static_cast<u32>(z) >= p.in_d) continue;
      int y = h.position;
      for (u32 r = h.tap; r < p.kernel_h; r += p.tap_step_h, y += DIRECTION * static_cast<int>(p.move_h)) {
        if (static_cast<u32>(y) >= p.in_h) continue;
        int xx = w.position;
        for (u32 s = w.tap; s < p.kernel_w; s += p.tap_step_w, xx += DIRECTION * static_cast<int>(p.move_w)) {
          if (static_cast<u32>(xx) >= p.in_w) continue;
          const config::x_t* pixel = x + z * p.x_depth + y * p.x_row + xx * p.x_pixel;
          const config::w_t* tap = filter + q * p.w_d + r * p.w_h + s * p.w_w;
          if constexpr (config::depthwise) {
            const auto value = read<config::x_t, config::x_vector>(pixel, p.x_channel);
            const auto weight = read<config::w_t, config::w_vector>(tap, p.w_group);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i)
              sum[i] += static_cast<Sum>(widen(value.element[i])) * static_cast<Sum>(widen(weight.element[i]));
          } else {
            for (u32 c = 0; c < p.channels; ++c) {
              const Sum value = static_cast<Sum>(widen(pixel[c * p.x_channel]));
              const auto weight = read<config::w_t, config::w_vector>(tap + c * p.w_channel, p.w_column);
#pragma unroll
              for (int i = 0; i < WIDTH; ++i) sum[i] += value * static_cast<Sum>(widen(weight.element[i]));
            }
          }
        }
      }
    }
    Epilogue::store(p, row, column, WIDTH, sum);
  }
  stamp_end(p.stamp);
}
