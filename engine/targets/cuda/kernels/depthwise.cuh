// Depthwise convolution, NHWC: every channel with its own small filter. Bound by memory, so no matrix units: a thread computes
// 8 channels of a patch of ROWS × STRIP outputs; each input it reads is converted once and serves all of them. Sums in fp32.
// Four neighbouring threads take 32 neighbouring channels, the others neighbouring patches: reads of x fill their sectors and
// a filter element is one broadcast. w is fp32, packed [kernel row, kernel column, channel]. config::unrolled: over rows of inputs,
// too, where registers allow to load the next ones ahead.
#pragma once
#include "epilogue/access.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

constexpr int KERNEL_H = config::kernel_h, KERNEL_W = config::kernel_w, ROWS = config::rows, STRIP = config::strip;
constexpr int STRIDE_H = config::stride_h, STRIDE_W = config::stride_w, DILATION_H = config::dilation_h, DILATION_W = config::dilation_w;
constexpr int SPAN_H = (ROWS - 1) * STRIDE_H + (KERNEL_H - 1) * DILATION_H + 1;
constexpr int SPAN_W = (STRIP - 1) * STRIDE_W + (KERNEL_W - 1) * DILATION_W + 1;
constexpr int STEP = ROWS == 1 ? DILATION_H : 1;  // between the rows of inputs that some tap reads

extern "C" __global__ void __launch_bounds__(config::threads, config::blocks) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 vectors = p.channels / 8, groups = (vectors + 3) / 4;
  const u32 strips = (p.out_w + STRIP - 1) / STRIP, bands = (p.out_h + ROWS - 1) / ROWS;
  u32 index = (blockIdx.x * config::threads + threadIdx.x) / 4;
  const u32 strip = index % strips;
  index /= strips;
  const u32 band = index % bands;
  index /= bands;
  const u32 vector = index % groups * 4 + threadIdx.x % 4, image = index / groups;
  if (image < p.images && vector < vectors) {
    const u32 channel = 8 * vector, out_x = strip * STRIP, out_y = band * ROWS;
    const int y0 = static_cast<int>(out_y * STRIDE_H) - p.pad_h, x0 = static_cast<int>(out_x * STRIDE_W) - p.pad_w;
    const config::x_t* x = p.x + image * p.x_image + channel;
    const float* w = p.w + channel;

    float sum[ROWS][STRIP][8] = {};
#pragma unroll(config::unrolled ? SPAN_H : 1)
    for (int i = 0; i < SPAN_H; i += STEP) {
      const int y = y0 + i;
      float value[SPAN_W][8];
#pragma unroll
      for (int j = 0; j < SPAN_W; ++j) {
        const int xx = x0 + j;
        Pack<config::x_t> pack{};
        if (static_cast<u32>(y) < p.in_h && static_cast<u32>(xx) < p.in_w)
          pack = *reinterpret_cast<const Pack<config::x_t>*>(x + y * p.x_row + xx * p.x_pixel);
#pragma unroll
        for (int c = 0; c < 8; ++c) value[j][c] = widen(pack.element[c]);
      }
#pragma unroll
      for (int o = 0; o < ROWS; ++o) {
        const int offset = i - o * STRIDE_H, r = offset / DILATION_H;
        if (offset < 0 || offset % DILATION_H != 0 || r >= KERNEL_H) continue;
#pragma unroll
        for (int s = 0; s < KERNEL_W; ++s) {
          const float4* tap = reinterpret_cast<const float4*>(w + (r * KERNEL_W + s) * p.channels);
          const float4 low = tap[0], high = tap[1];
          const float weight[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int j = 0; j < STRIP; ++j)
#pragma unroll
            for (int c = 0; c < 8; ++c)
              sum[o][j][c] = fmaf(value[j * STRIDE_W + s * DILATION_W][c], weight[c], sum[o][j][c]);
        }
      }
    }
#pragma unroll
    for (int o = 0; o < ROWS; ++o)
#pragma unroll
      for (int j = 0; j < STRIP; ++j)
        if (out_y + o < p.out_h && out_x + j < p.out_w)
          Epilogue::store(p, (image * p.out_h + out_y + o) * p.out_w + out_x + j, channel, 8, sum[o][j]);
  }
  stamp_end(p.stamp);
}
