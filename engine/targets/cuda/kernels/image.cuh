// Photos to a model's input, in one pass: resampling of a box of each image (a resize and a crop), normalisation, layout.
// Resampling is that of Pillow 13: filters widened by the scale when shrinking, so that no pixel is skipped; centres half a
// pixel in; weights renormalised at the edges and rounded to 22 bits; rows and columns in its order, and each pass rounded to
// the 8 bits that the pixels came from.
#pragma once
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

// One image: where its first byte lies (rows of width · CHANNELS bytes), its size, and the edges of the box that becomes the
// output.
struct ImageBox { i64 offset; i32 width, height; float left, top, right, bottom; };

constexpr int CHANNELS = config::channels;
enum class Filter { BILINEAR, BICUBIC };  // in the order of image.py
constexpr Filter FILTER = static_cast<Filter>(config::filter);
constexpr double SUPPORT = FILTER == Filter::BILINEAR ? 1.0 : 2.0;
constexpr int WEIGHT_BITS = 22;  // a sum of weighted levels has 32, two of them for filters that go below 0 and above 1
constexpr int HALF = 1 << (WEIGHT_BITS - 1);

DEVICE float filter_weight(float x) {
  x = fabsf(x);
  if constexpr (FILTER == Filter::BILINEAR) return fmaxf(1.0f - x, 0.0f);
  constexpr float A = -0.5f;
  if (x < 1.0f) return ((A + 2.0f) * x - (A + 3.0f)) * x * x + 1.0f;
  return x < 2.0f ? (((x - 5.0f) * x + 8.0f) * x - 4.0f) * A : 0.0f;
}

DEVICE int level_of(int sum) { return min(max(sum >> WEIGHT_BITS, 0), 255); }

// The input positions that output position `i` is made of, [first, last), and their weights.
struct Window {
  int first, last;
  float begin, narrowing, unit;  // `begin`: from the window's centre to the first position
  // NOTES: where the window lies is found in fp64, once a thread: in a long side the places of fp32 are too far apart.
  DEVICE Window(u32 i, float from, float to, int outputs, int inputs) {
    const double scale = static_cast<double>(to - from) / outputs, widened = scale < 1.0 ? 1.0 : scale;
    const double reach = SUPPORT * widened, centre = from + (i + 0.5) * scale;
    first = max(0, static_cast<int>(centre - reach + 0.5));
    last = min(inputs, static_cast<int>(centre + reach + 0.5));
    begin = static_cast<float>(first + 0.5 - centre);
    narrowing = static_cast<float>(1.0 / widened);
    float total = 0.0f;
    for (int x = first; x < last; ++x) total += filter_weight((begin + (x - first)) * narrowing);
    unit = (1 << WEIGHT_BITS) / total;
  }
  DEVICE int weight(int x) const { return static_cast<int>(rintf(filter_weight((begin + (x - first)) * narrowing) * unit)); }
};

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 index = blockIdx.x * config::threads + threadIdx.x, line = index / p.out_w, out_x = index - line * p.out_w;
  const u32 image = line / p.out_h, out_y = line - image * p.out_h;
  if (image < p.images) {
    const ImageBox box = p.boxes[image];
    const int out_w = p.out_w, out_h = p.out_h;
    const Window across(out_x, box.left, box.right, out_w, box.width), down(out_y, box.top, box.bottom, out_h, box.height);
    const u8* pixels = p.pixels + box.offset;
    const i64 row = static_cast<i64>(box.width) * CHANNELS;
    // Pillow's order: along the rows first, but where the height shrinks by more than twice what the width does.
    const bool down_first = box.height > out_h && box.height - out_h > 2 * (box.width - out_w);
    const Window inner = down_first ? down : across, outer = down_first ? across : down;
    const i64 inner_step = down_first ? row : CHANNELS, outer_step = down_first ? CHANNELS : row;
    int sum[CHANNELS];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) sum[c] = HALF;
    for (int o = outer.first; o < outer.last; ++o) {
      int between[CHANNELS];
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) between[c] = HALF;
      for (int i = inner.first; i < inner.last; ++i) {
        const u8* pixel = pixels + o * outer_step + i * inner_step;
        const int weight = inner.weight(i);
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) between[c] += weight * pixel[c];
      }
      const int weight = outer.weight(o);
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) sum[c] += weight * level_of(between[c]);
    }
    const float mean[3] = {p.mean_0, p.mean_1, p.mean_2}, scale[3] = {p.scale_0, p.scale_1, p.scale_2};
    const i64 at = image * p.out_stride[0] + out_y * p.out_stride[2] + out_x * p.out_stride[3];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
      p.out[at + c * p.out_stride[1]] = narrow<config::out_t>((level_of(sum[c]) - mean[c]) * scale[c]);
  }
  stamp_end(p.stamp);
}
