// Sums over the pixels of an image of what a warp stores, for a mean beside the result: a lane adds up the rows that it stores of eight
// channels; where an image or the warp's part of it ends, lanes of one unit (UNIT pixels side by side, DISTANCE lanes apart) join theirs.
// Sums lie in [image][part][unit][channel], the parts of an image in the order of its rows; every place is written, always by the same
// lane, so that whoever joins them gets the same bits in every run.
#pragma once
#include "epilogue/access.cuh"

// A row of results that a unit has stored. It is row `row` of all images, `pitch` rows apart; `ends`: the last one of an image (`whole`)
// or of the unit's stream, each `p.outputs` rows of all.
struct EndOfRow {
  bool ends, whole;
  u32 row, pitch, stream, unit, channel;
};

template <bool ON, int UNIT, int DISTANCE> struct ImageSums {
  DEVICE void add(const float (&)[8], const Epilogue::Inputs&) {}
  template <class PARAMS> DEVICE void end_row(const PARAMS&, const EndOfRow&) {}
};

template <int UNIT, int DISTANCE> struct ImageSums<true, UNIT, DISTANCE> {
  float total[8] = {};

  // Adds what the epilogue makes of eight sums.
  DEVICE void add(const float (&sums)[8], const Epilogue::Inputs& inputs) {
    float value[8];
    Result::of(sums, inputs, value);
#pragma unroll
    for (int i = 0; i < 8; ++i) total[i] += value[i];
  }

  // For all lanes of a warp. What ends is the same for all lanes of a unit.
  template <class PARAMS> DEVICE void end_row(const PARAMS& p, const EndOfRow& at) {
    if (!__any_sync(~0u, at.ends)) return;
    float joined[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      joined[i] = total[i];
      for (int distance = DISTANCE; distance < UNIT * DISTANCE; distance *= 2) joined[i] += __shfl_xor_sync(~0u, joined[i], distance);
    }
    if (!at.ends) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) total[i] = 0.0f;
    if (threadIdx.x / DISTANCE % UNIT != 0 || at.unit >= p.sum_units || at.channel >= p.channels) return;
    const u32 image = at.row / at.pitch, part = at.stream - image * at.pitch / p.outputs;
    float* place = p.sums + ((static_cast<i64>(image) * p.sum_parts + part) * p.sum_units + at.unit) * p.channels + at.channel;
    reinterpret_cast<float4*>(place)[0] = make_float4(joined[0], joined[1], joined[2], joined[3]);
    reinterpret_cast<float4*>(place)[1] = make_float4(joined[4], joined[5], joined[6], joined[7]);
    // Images that lie in fewer parts than others.
    for (u32 next = part + 1; at.whole && next < p.sum_parts; ++next) {
      place += static_cast<i64>(p.sum_units) * p.channels;
      reinterpret_cast<float4*>(place)[0] = reinterpret_cast<float4*>(place)[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
};
