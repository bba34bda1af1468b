// Filters that another kernel has computed, from the strides they have to the rows that conv_mma.cuh reads: [phase][group, n]
// (kernel position, channel), padded with zeros to whole 16-byte chunks. A thread writes one element.
// config: phased: block z packs the taps of phase z (conv_geometry.cuh).
#pragma once
#include "conv_geometry.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

struct Rows {
  u32 kernel_h, kernel_w, k, stride, first_d, first_h, first_w;
  i64 start;
};

template <class PARAMS> DEVICE Rows rows_of(const PARAMS& p) {
  if constexpr (config::phased) {
    const Phase& f = p.phases[blockIdx.z];
    return {f.kernel[1], f.kernel[2], f.k, f.w_stride, f.first_tap[0], f.first_tap[1], f.first_tap[2], f.w};
  } else {
    return {p.kernel_h, p.kernel_w, p.k, p.w_stride, p.first_d, p.first_h, p.first_w, 0};
  }
}

// Tap number `i` of a phase: a transposed convolution has them from the last to the first.
DEVICE i64 tap_at(u32 first, u32 step, u32 i) { return config::transposed ? first - i * step : first + i * step; }

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const Rows rows = rows_of(p);
  const u32 k = blockIdx.x * config::threads + threadIdx.x;
  if (k < rows.stride) {
    const u32 tap = k / p.channels, channel = k - tap * p.channels, line = tap / rows.kernel_w, q = line / rows.kernel_h;
    const i64 offset = tap_at(rows.first_d, p.tap_step_d, q) * p.w_d + tap_at(rows.first_h, p.tap_step_h, line - q * rows.kernel_h) * p.w_h +
                       tap_at(rows.first_w, p.tap_step_w, tap - line * rows.kernel_w) * p.w_w + channel * p.w_channel;
    for (u32 row = blockIdx.y; row < p.groups * p.n; row += gridDim.y) {
      const u32 group = row / p.n;
      p.packed[rows.start + static_cast<i64>(row) * rows.stride + k] =
          k < rows.k ? p.w[offset + group * p.w_group + (row - group * p.n) * p.w_column] : config::w_t();
    }
  }
  stamp_end(p.stamp);
}
