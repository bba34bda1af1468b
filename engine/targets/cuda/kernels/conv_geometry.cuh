// What the convolution kernels share: three spatial axes (depth, row, pixel), and the phases of a transposed convolution.
#pragma once
#include "types.cuh"

// The outputs start, start + step, … of a transposed convolution along each axis (step: its stride) are one ordinary
// convolution with some of the taps: output t of it reads inputs t − pad, t − pad + dilation, … Filled by conv_geometry.py.
struct Phase {
  i64 w;  // first element of its packed weights
  u32 k, w_stride;
  u32 kernel[3], out[3], start[3];
  u32 first_tap[3];  // the filter's tap at kernel position 0; the next ones come before it, `tap_step` apart
  int pad[3];
};

// Where in k a thread's chunk stands. Advancing by additions spares divisions for every chunk.
template <bool DEPTH> struct Tap {
  u32 q, r, s, channel;
  DEVICE static Tap at(u32 k, u32 channels, u32 kernel_h, u32 kernel_w) {
    const u32 tap = k / channels, line = tap / max(1u, kernel_w), q = DEPTH ? line / max(1u, kernel_h) : 0;  // a phase may have no taps
    return {q, line - q * kernel_h, tap - line * kernel_w, k - tap * channels};
  }
  DEVICE void advance(u32 by, u32 channels, u32 kernel_h, u32 kernel_w) {
    channel += by;
    while (channel >= channels) {
      channel -= channels;
      if (++s == kernel_w) {
        s = 0;
        if (++r == kernel_h && DEPTH) { r = 0; ++q; }
      }
    }
  }
};
