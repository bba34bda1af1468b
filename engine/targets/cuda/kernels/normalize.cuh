// Layer, RMS and L2 norm, softmax and its logarithm of rows that fit in registers. A row stays with its group of threads (part
// of a warp, a warp, or the block): read once through the prologue, reduced exactly (the variance around the mean), written
// once through the epilogue. A row is `steps` pieces of `columns` neighbouring elements. All loads are under way at once: what lies
// beyond the row is replaced by its beginning, so that no load waits for a comparison.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/group_reduce.cuh"
#include "scheduler/stamp.cuh"
#include "scheduler/statistic.cuh"

constexpr int GROUP = config::threads_per_row, CHUNKS = config::chunks, ROWS = config::threads / GROUP;
constexpr bool AHEAD = CHUNKS * sizeof(Value) <= 16;  // registers hold what the epilogue reads beside the row
static_assert(GROUP <= 32 || ROWS == 1, "a row belongs to a part of a warp or to the block");

struct Place { u32 row, column, count; };  // of WIDTH elements; count 0: beyond the row

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 index = blockIdx.x * ROWS + threadIdx.x / GROUP, lane = threadIdx.x % GROUP;
  const u32 row = min(index, p.rows - 1);  // all threads of a warp take part in its shuffles
  const auto place = [&](int i) {
    u32 chunk = i * GROUP + lane, step = 0;
    if constexpr (config::stepped) {
      step = chunk / p.chunks;
      chunk -= step * p.chunks;
    }
    const u32 column = chunk * WIDTH;
    const bool inside = step < p.steps && column < p.columns;
    return Place{config::stepped ? row * p.steps + step : row, column, inside ? min(static_cast<u32>(WIDTH), p.columns - column) : 0};
  };
  Value v[CHUNKS][WIDTH];
  const auto each = [&](auto&& visit) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const u32 count = place(i).count;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j)
        if (j < count) visit(v[i][j]);
    }
  };
  // A place of the row even where `at` is beyond it.
  const auto within = [&](Place at) {
    if (at.count > 0) return at;
    return Place{config::stepped ? row * p.steps : row, 0, min(static_cast<u32>(WIDTH), p.columns)};
  };
  const auto rows = Prologue::at(p, config::stepped ? row * p.steps : row);  // looked up once
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    const Place at = within(place(i));
    if constexpr (config::stepped) Prologue::load(p, at.row, at.column, at.count, v[i]);
    else Prologue::load(p, rows, at.column, at.count, v[i]);
  }
  typename Epilogue::Inputs inputs[AHEAD ? CHUNKS : 1];
  if constexpr (AHEAD) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const Place at = within(place(i));
      inputs[i] = Epilogue::fetch(p, at.row, at.column, at.count);
    }
  }

  Value shift = 0, sum = 0;
  if constexpr (EXPONENTIAL) {
    shift = static_cast<Value>(-INFINITY);
    each([&](Value& x) { shift = x > shift ? x : shift; });  // a NaN comes back through the exponential
    shift = reduce_group<Maximum, GROUP>(shift);
    each([&](Value& x) { sum += exponential(x - shift); });
  } else {
    if constexpr (KIND == Kind::LAYER) {
      each([&](Value& x) { shift += x; });
      shift = reduce_group<Sum, GROUP>(shift) / static_cast<Value>(p.count);
    }
    each([&](Value& x) { sum += (x - shift) * (x - shift); });
  }
  const Scaling scaling = scaling_of(p, shift, reduce_group<Sum, GROUP>(sum));
  each([&](Value& x) { x = scaling(x); });

#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    const Place at = place(i);
    if (at.count > 0 && index < p.rows) {
      if constexpr (AHEAD) Epilogue::store(p, at.row, at.column, at.count, v[i], inputs[i]);
      else Epilogue::store(p, at.row, at.column, at.count, v[i]);
    }
  }
  stamp_end(p.stamp);
}
