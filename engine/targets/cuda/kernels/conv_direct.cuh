// Convolution of an image with few channels (the first layer of a network), on the fp32 units: its products are too few to
// fill matrix tiles, and its output is what costs. A thread computes PIXELS neighbouring outputs × OUTPUTS channels; x has any
// float type and strides (NCHW fp32 as the caller hands it in, or NHWC), filters stand in shared memory as fp32 [k][channel].
#pragma once
#include "epilogue/access.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

constexpr int CHANNELS = config::channels, KERNEL_D = config::kernel_d, KERNEL_H = config::kernel_h, KERNEL_W = config::kernel_w;
constexpr int STRIDE_W = config::stride_w, DILATION_W = config::dilation_w, PIXELS = config::pixels, OUTPUTS = config::outputs;
constexpr int TAPS = KERNEL_D * KERNEL_H * KERNEL_W * CHANNELS, SPAN = (PIXELS - 1) * STRIDE_W + (KERNEL_W - 1) * DILATION_W + 1;
static_assert(OUTPUTS % 8 == 0, "outputs are stored eight at a time");

extern "C" __global__ void __launch_bounds__(config::threads, config::blocks) kernel(const __grid_constant__ Params p) {
  __shared__ __align__(16) float filter[TAPS][OUTPUTS];
  const u32 n0 = blockIdx.y * OUTPUTS;
  let_next_kernel_start();
  // Filters are constants: no kernel before this one writes them.
  for (u32 i = threadIdx.x; i < TAPS * OUTPUTS; i += config::threads)
    filter[i / OUTPUTS][i % OUTPUTS] = n0 + i % OUTPUTS < p.n ? p.w[i / OUTPUTS * p.n + n0 + i % OUTPUTS] : 0.0f;
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  __syncthreads();

  const u32 strips = (p.out_w + PIXELS - 1) / PIXELS, index = blockIdx.x * config::threads + threadIdx.x;
  const u32 line = index / strips, out_x = (index - line * strips) * PIXELS, plane = line / p.out_h, out_y = line - plane * p.out_h;
  const u32 image = plane / p.out_d, out_z = plane - image * p.out_d;
  if (image < p.images) {
    const int z0 = static_cast<int>(out_z * p.stride_d) - p.pad_d, y0 = static_cast<int>(out_y * p.stride_h) - p.pad_h;
    const int x0 = static_cast<int>(out_x * STRIDE_W) - p.pad_w;
    const config::x_t* x = p.x + image * p.x_image;
    float sum[PIXELS][OUTPUTS] = {};
#pragma unroll 1
    for (int row = 0; row < KERNEL_D * KERNEL_H; ++row) {
      const int q = KERNEL_D == 1 ? 0 : row / KERNEL_H, r = row - q * KERNEL_H;
      const int z = z0 + q * static_cast<int>(p.dilation_d), y = y0 + r * static_cast<int>(p.dilation_h);
      if (static_cast<u32>(z) >= p.in_d || static_cast<u32>(y) >= p.in_h) continue;
#pragma unroll
      for (int channel = 0; channel < CHANNELS; ++channel) {
        float value[SPAN];
#pragma unroll
        for (int j = 0; j < SPAN; ++j) {
          const int xx = x0 + j;
          const bool inside = static_cast<u32>(xx) < p.in_w;
          value[j] = inside ? widen(x[z * p.x_depth + y * p.x_row + xx * p.x_pixel + channel * p.x_channel]) : 0.0f;
        }
#pragma unroll
        for (int s = 0; s < KERNEL_W; ++s) {
          const float4* tap = reinterpret_cast<const float4*>(filter[(row * KERNEL_W + s) * CHANNELS + channel]);
#pragma unroll
          for (int n = 0; n < OUTPUTS / 4; ++n) {
            const float4 w = tap[n];
#pragma unroll
            for (int j = 0; j < PIXELS; ++j) {
              const float v = value[j * STRIDE_W + s * DILATION_W];
              sum[j][4 * n] = fmaf(v, w.x, sum[j][4 * n]);
              sum[j][4 * n + 1] = fmaf(v, w.y, sum[j][4 * n + 1]);
              sum[j][4 * n + 2] = fmaf(v, w.z, sum[j][4 * n + 2]);
              sum[j][4 * n + 3] = fmaf(v, w.w, sum[j][4 * n + 3]);
            }
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < PIXELS; ++j)
#pragma unroll
      for (int n = 0; n < OUTPUTS; n += 8) {
        float v[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) v[c] = sum[j][n + c];
        if (out_x + j < p.out_w && n0 + n < p.n) Epilogue::store(p, line * p.out_w + out_x + j, n0 + n, min(8u, p.n - n0 - n), v);
      }
  }
  stamp_end(p.stamp);
}
