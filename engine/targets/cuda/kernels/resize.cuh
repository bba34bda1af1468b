// Resizing by nearest, linear or cubic interpolation along any axes, in any layout: a thread computes WIDTH neighbouring columns of
// one row of the result. Where it reads along a resized axis, and with what weights, stands in a table (resize.py). Columns that
// are resized themselves are read one by one.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

using Value = config::value_t;
constexpr int AXES = config::axes, TAPS = config::taps;  // axes of the rows, innermost last
constexpr Column COLUMN = config::column_unit ? Column::UNIT : Column::STRIDED;
static_assert(!config::column_resized || WIDTH == 1, "neighbouring columns that are resized have no neighbouring sources");

struct Tap { int index; float weight; };

constexpr bool is_resized(int axis) { return config::resized >> axis & 1; }

// Adds the source's columns at `offset`, weighted; without interpolation they are the result.
DEVICE void add_columns(const Params& p, i64 offset, Value weight, u32 column, u32 count, Value (&v)[WIDTH]) {
  if constexpr (config::column_resized) {
    const Tap* taps = p.taps + p.column_taps + column * TAPS;
    const config::input_t* x = static_cast<const config::input_t*>(p.x.data) + offset;
    Value sum = 0;
#pragma unroll(TAPS <= 4 ? TAPS : 1)
    for (int i = 0; i < TAPS; ++i) {
      const Value element = static_cast<Value>(widen(x[taps[i].index * p.x.column]));
      if constexpr (TAPS == 1) sum = element;
      else sum += static_cast<Value>(taps[i].weight) * element;
    }
    if constexpr (TAPS == 1) v[0] = sum;
    else v[0] += weight * sum;
  } else {
    const auto x = fetch_columns<config::input_t, COLUMN, config::x_vector>(p.x, offset, column, count);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      if constexpr (TAPS == 1) v[i] = static_cast<Value>(x[i]);
      else v[i] += weight * static_cast<Value>(x[i]);
    }
  }
}

// The taps of all resized axes from AXIS on: every product of their weights meets one place of the source.
template <int AXIS>
DEVICE void add_taps(const Params& p, const Tap* const (&taps)[AXES], i64 offset, Value weight, u32 column, u32 count, Value (&v)[WIDTH]) {
  if constexpr (AXIS == AXES) {
    add_columns(p, offset, weight, column, count, v);
  } else if constexpr (is_resized(AXIS)) {
    for (int i = 0; i < TAPS; ++i) {
      const Tap tap = taps[AXIS][i];
      const Value product = TAPS == 1 ? weight : weight * static_cast<Value>(tap.weight);
      add_taps<AXIS + 1>(p, taps, offset + tap.index * p.strides[AXIS], product, column, count, v);
    }
  } else {
    add_taps<AXIS + 1>(p, taps, offset, weight, column, count, v);
  }
}

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 chunks = (p.columns + WIDTH - 1) / WIDTH, total = p.rows * chunks;
  for (u32 index = blockIdx.x * config::threads + threadIdx.x; index < total; index += gridDim.x * config::threads) {
    const u32 row = index / chunks, column = (index - row * chunks) * WIDTH;
    u32 rest = row;
    i64 offset = 0;
    const Tap* taps[AXES] = {};
#pragma unroll
    for (int axis = AXES - 1; axis >= 0; --axis) {
      const u32 size = static_cast<u32>(p.sizes[axis]), outer = axis > 0 ? rest / size : 0, place = rest - outer * size;
      rest = outer;
      if (is_resized(axis)) taps[axis] = p.taps + p.first_taps[axis] + place * TAPS;
      else offset += place * p.strides[axis];
    }
    const u32 count = min(static_cast<u32>(WIDTH), p.columns - column);
    Value v[WIDTH] = {};
    add_taps<0>(p, taps, offset, Value(1), column, count, v);
    Epilogue::store(p, row, column, count, v);
  }
  stamp_end(p.stamp);
}
