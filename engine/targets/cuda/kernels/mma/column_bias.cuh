// What the sums of a fragment of mma.sync begin with: zeros, or (ON) constants of its columns, of which a lane has two neighbours.
#pragma once
#include "types.cuh"

template <bool ON> struct ColumnBias {
  template <class PARAMS> DEVICE void load(const PARAMS&, u32) {}
  DEVICE void begin(float (&sum)[4]) const { sum[0] = sum[1] = sum[2] = sum[3] = 0.0f; }
};

template <> struct ColumnBias<true> {
  float2 two;
  template <class PARAMS> DEVICE void load(const PARAMS& p, u32 column) { two = *reinterpret_cast<const float2*>(p.bias + column); }
  DEVICE void begin(float (&sum)[4]) const {
    sum[0] = sum[2] = two.x;
    sum[1] = sum[3] = two.y;
  }
};
