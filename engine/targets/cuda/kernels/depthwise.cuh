// Depthwise convolution, NHWC: every channel with its own k×k filter. Bound by memory, so no matrix units: a thread computes
// 8 channels of STRIP neighbouring outputs of one row; each 16-byte load of x serves all the outputs whose window holds it.
// w is packed [kernel row, kernel column, channel]. Sums in fp32.
#pragma once
#include "epilogue/access.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

constexpr int KERNEL_H = config::kernel_h, KERNEL_W = config::kernel_w, STRIDE = config::stride_w, DILATION = config::dilation_w;
constexpr int STRIP = config::strip, SPAN = (STRIP - 1) * STRIDE + (KERNEL_W - 1) * DILATION + 1;

DEVICE void unpack(uint4 packed, float (&v)[8]) {
  const u32 word[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_half2(word[i]);
    v[2 * i] = pair.x;
    v[2 * i + 1] = pair.y;
  }
}

extern "C" __global__ void __launch_bounds__(config::threads, config::blocks) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 vectors = p.channels / 8, strips = (p.out_w + STRIP - 1) / STRIP;
  const u32 index = blockIdx.x * config::threads + threadIdx.x, total = p.images * p.out_h * strips * vectors;
  if (index < total) {
    const u32 vector = index % vectors, rest = index / vectors;
    const u32 strip = rest % strips, row = rest / strips, image = row / p.out_h, out_y = row - image * p.out_h;
    const u32 channel = 8 * vector, out_x = strip * STRIP;
    const int y0 = static_cast<int>(out_y * p.stride_h) - p.pad_h, x0 = static_cast<int>(out_x * STRIDE) - p.pad_w;
    const half* x = p.x + image * p.x_image + channel;
    const half* w = p.w + channel;

    float sum[STRIP][8] = {};
#pragma unroll
    for (int r = 0; r < KERNEL_H; ++r) {
      const int y = y0 + r * static_cast<int>(p.dilation_h);
      if (static_cast<u32>(y) >= p.in_h) continue;
      float weight[KERNEL_W][8];
#pragma unroll
      for (int s = 0; s < KERNEL_W; ++s)
        unpack(*reinterpret_cast<const uint4*>(w + static_cast<i64>(r * KERNEL_W + s) * p.channels), weight[s]);
#pragma unroll
      for (int i = 0; i < SPAN; ++i) {
        const int xx = x0 + i;
        float value[8] = {};
        if (static_cast<u32>(xx) < p.in_w) unpack(*reinterpret_cast<const uint4*>(x + y * p.x_row + xx * p.x_pixel), value);
#pragma unroll
        for (int s = 0; s < KERNEL_W; ++s) {
          const int distance = i - s * DILATION;
          if (distance >= 0 && distance % STRIDE == 0 && distance / STRIDE < STRIP) {
#pragma unroll
            for (int c = 0; c < 8; ++c) sum[distance / STRIDE][c] = fmaf(value[c], weight[s][c], sum[distance / STRIDE][c]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < STRIP; ++i)
      if (out_x + i < p.out_w) Epilogue::store(p, row * p.out_w + out_x + i, channel, 8, sum[i]);
  }
  stamp_end(p.stamp);
}
