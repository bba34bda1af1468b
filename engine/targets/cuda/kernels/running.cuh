// Running sums and products along an axis. A block takes a line piece by piece: each thread a few neighbours, the threads' totals
// added up by shuffles, what came before carried on. Lines that lie side by side, where there are many: a thread takes one each.
#pragma once
#include "ptx/grid.cuh"
#include "scheduler/group_reduce.cuh"
#include "scheduler/stamp.cuh"

using Element = config::element;
using Operation = config::operation;
using Value = compute_t<Element>;
constexpr int AXES = config::axes, THREADS = config::threads, ITEMS = 4;  // axes of the lines, innermost last
constexpr bool IS_SUM = same<Operation, Sum>::value;

DEVICE Value identity() { return IS_SUM ? Value(0) : Value(1); }

struct Line { const Element* x; Element* y; };

DEVICE Line line_at(const Params& p, u32 line) {
  Line at = {p.x, p.y};
#pragma unroll
  for (int axis = AXES - 1; axis >= 0; --axis) {
    const u32 size = static_cast<u32>(p.sizes[axis]), outer = axis > 0 ? line / size : 0, place = line - outer * size;
    line = outer;
    at.x += place * p.x_strides[axis];
    at.y += place * p.y_strides[axis];
  }
  return at;
}
DEVICE u32 place_of(const Params& p, u32 i) { return config::reverse ? p.n - 1 - i : i; }

DEVICE void follow(const Params& p, const Line& line) {
  Value total = identity();
#pragma unroll 4
  for (u32 i = 0; i < p.n; ++i) {
    const u32 place = place_of(p, i);
    const Value next = Operation::of(total, widen(line.x[place * p.x_along]));
    line.y[place * p.y_along] = narrow<Element>(config::exclusive ? total : next);
    total = next;
  }
}

// What the threads before this one hold, combined, after `carry`; `carry` becomes that of all.
DEVICE Value before_this_thread(Value own, Value& carry) {
  __shared__ Value totals[THREADS / 32];
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Value sum = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Value other = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum = Operation::of(other, sum);
  }
  Value before = __shfl_up_sync(~0u, sum, 1);
  if (lane == 0) before = identity();
  __syncthreads();  // the totals of the piece before are read
  if (lane == 31) totals[warp] = sum;
  __syncthreads();
  Value lead = carry;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) {
    if (i == warp) before = Operation::of(lead, before);
    lead = Operation::of(lead, totals[i]);
  }
  carry = lead;
  return before;
}

DEVICE void scan(const Params& p, const Line& line) {
  Value carry = identity();
  for (u32 base = 0; base < p.n; base += THREADS * ITEMS) {
    const u32 first = base + threadIdx.x * ITEMS;
    Value v[ITEMS], own = identity();
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      v[i] = first + i < p.n ? widen(line.x[place_of(p, first + i) * p.x_along]) : identity();
      own = Operation::of(own, v[i]);
    }
    Value total = before_this_thread(own, carry);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const Value next = Operation::of(total, v[i]);
      if (first + i < p.n) line.y[place_of(p, first + i) * p.y_along] = narrow<Element>(config::exclusive ? total : next);
      total = next;
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  if constexpr (config::side_by_side) {
    const u32 line = blockIdx.x * THREADS + threadIdx.x;
    if (line < p.lines) follow(p, line_at(p, line));
  } else {
    for (u32 line = blockIdx.x; line < p.lines; line += gridDim.x) scan(p, line_at(p, line));
  }
  stamp_end(p.stamp);
}
