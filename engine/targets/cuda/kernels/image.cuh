// Photos to a model's input, in one pass: resampling of a box of each image (a resize and a crop), normalisation, layout.
// Filters are those of Pillow: widened by the scale when shrinking, so that no pixel is skipped; centres half a pixel in;
// weights renormalised at the edges; rows first, then columns, each rounded to the 8 bits that the pixels came from.
#pragma once
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

// One image: where its first byte lies (rows of width · CHANNELS bytes), its size, and the box that becomes the output.
struct ImageBox { i64 offset; i32 width, height; float left, top, box_width, box_height; };

constexpr int CHANNELS = config::channels;
enum class Filter { BILINEAR, BICUBIC };  // in the order of image.py
constexpr Filter FILTER = static_cast<Filter>(config::filter);
constexpr float SUPPORT = FILTER == Filter::BILINEAR ? 1.0f : 2.0f;

DEVICE float filter_weight(float x) {
  x = fabsf(x);
  if constexpr (FILTER == Filter::BILINEAR) return fmaxf(1.0f - x, 0.0f);
  constexpr float A = -0.5f;
  if (x < 1.0f) return ((A + 2.0f) * x - (A + 3.0f)) * x * x + 1.0f;
  return x < 2.0f ? (((x - 5.0f) * x + 8.0f) * x - 4.0f) * A : 0.0f;
}

DEVICE float level_of(float x) { return fminf(fmaxf(rintf(x), 0.0f), 255.0f); }

// The input positions that output position `i` is made of: [first, last), around `centre`, weights `filter_weight((x + 0.5 −
// centre) · narrowing)`.
struct Window {
  int first, last;
  float centre, narrowing;
  DEVICE Window(u32 i, float start, float extent, u32 outputs, int inputs) {
    const float scale = extent / outputs, widened = fmaxf(scale, 1.0f), reach = SUPPORT * widened;
    centre = start + (i + 0.5f) * scale;
    narrowing = 1.0f / widened;
    first = max(0, static_cast<int>(centre - reach + 0.5f));
    last = min(inputs, static_cast<int>(centre + reach + 0.5f));
  }
  DEVICE float weight(int x) const { return filter_weight((x + 0.5f - centre) * narrowing); }
};

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 index = blockIdx.x * config::threads + threadIdx.x, line = index / p.out_w, out_x = index - line * p.out_w;
  const u32 image = line / p.out_h, out_y = line - image * p.out_h;
  if (image < p.images) {
    const ImageBox box = p.boxes[image];
    const Window columns(out_x, box.left, box.box_width, p.out_w, box.width), rows(out_y, box.top, box.box_height, p.out_h, box.height);
    float column_total = 0.0f, row_total = 0.0f, sum[CHANNELS] = {};
    for (int x = columns.first; x < columns.last; ++x) column_total += columns.weight(x);
    for (int y = rows.first; y < rows.last; ++y) {
      const u8* pixels = p.pixels + box.offset + static_cast<i64>(y) * box.width * CHANNELS;
      float line_sum[CHANNELS] = {};
      for (int x = columns.first; x < columns.last; ++x) {
        const float weight = columns.weight(x);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) line_sum[c] = fmaf(weight, static_cast<float>(pixels[x * CHANNELS + c]), line_sum[c]);
      }
      const float weight = rows.weight(y);
      row_total += weight;
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) sum[c] = fmaf(weight, level_of(line_sum[c] / column_total), sum[c]);
    }
    const float mean[3] = {p.mean_0, p.mean_1, p.mean_2}, scale[3] = {p.scale_0, p.scale_1, p.scale_2};
    const i64 at = image * p.out_stride[0] + out_y * p.out_stride[2] + out_x * p.out_stride[3];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const float level = level_of(sum[c] / row_total);
      p.out[at + c * p.out_stride[1]] = narrow<config::out_t>((level - mean[c]) * scale[c]);
    }
  }
  stamp_end(p.stamp);
}
