// Max and average pooling over windows, NHWC: a thread computes WIDTH channels of one output pixel. Sums in fp32.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 chunks = (p.channels + WIDTH - 1) / WIDTH, index = blockIdx.x * config::threads + threadIdx.x;
  const u32 row = index / chunks, channel = (index - row * chunks) * WIDTH;
  if (row < p.images * p.out_h * p.out_w) {
    const u32 line = row / p.out_w, image = line / p.out_h, count = min(static_cast<u32>(WIDTH), p.channels - channel);
    const int x0 = static_cast<int>((row - line * p.out_w) * p.stride_w) - p.pad_w;
    const int y0 = static_cast<int>((line - image * p.out_h) * p.stride_h) - p.pad_h;
    float v[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) v[i] = config::maximum ? -INFINITY : 0.0f;
    u32 inside = 0, counted = 0;
    for (u32 r = 0; r < p.kernel_h; ++r)
      for (u32 s = 0; s < p.kernel_w; ++s) {
        const int y = y0 + static_cast<int>(r * p.dilation_h), xx = x0 + static_cast<int>(s * p.dilation_w);
        // Padding counts in an average that includes it; what ceil_mode adds beyond the padding never does.
        counted += y < static_cast<int>(p.in_h) + p.pad_end_h && xx < static_cast<int>(p.in_w) + p.pad_end_w;
        if (static_cast<u32>(y) >= p.in_h || static_cast<u32>(xx) >= p.in_w) continue;
        ++inside;
        const i64 pixel = image * p.x.row[0] + y * p.x.row[1] + xx * p.x.row[2];
        const auto x = fetch_columns<config::input_t, Column::UNIT, config::x_vector>(p.x, pixel, channel, count);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) v[i] = config::maximum ? max_nan(v[i], x[i]) : v[i] + x[i];
      }
    if constexpr (!config::maximum) {
      const float scale = 1.0f / static_cast<float>(config::count_padding ? counted : inside);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) v[i] *= scale;
    }
    Epilogue::store(p, row, channel, count, v);
  }
  stamp_end(p.stamp);
}
