// What the kernels of reductions share: a thread's walk over what it reduces, and blocks that share a walk (SPLIT). Each of these
// leaves what it found in `partial`, and the one that comes last joins the parts, always in the same order. `identity` and what
// `config` says come from reduce.py.
#pragma once
#include "epilogue/access.cuh"
#include "ptx/memory.cuh"
#include "scheduler/group_reduce.cuh"

using Operation = config::operation;
using Value = Prologue::value_t;
constexpr int THREADS = config::threads;
constexpr bool SPLIT = config::split;
constexpr int BATCH = config::batch;  // loads of a thread under way at once; more than there are would be loaded in vain
constexpr u32 CHAIN = 64;  // additions one after the other: a sum of n terms is off by a few times CHAIN + n / CHAIN roundings

DEVICE void reset(Value (&v)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) v[i] = identity();
}
DEVICE void combine(Value (&a)[WIDTH], const Value (&b)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) a[i] = Operation::of(a[i], b[i]);
}

// What is left to do when all parts are together. Narrow integers were reduced in 32 bits and wrap now.
DEVICE Value finished(const Params& p, Value x) {
  if constexpr (config::mean) {
    if constexpr (same<Value, float>::value || same<Value, double>::value) x /= static_cast<Value>(p.count);
    else x = p.count == 0 ? Value(0) : x / static_cast<Value>(p.count);
  }
  return static_cast<Value>(static_cast<config::element_t>(x));
}

// Reduces what `load` gives for indices first, first + stride, … below `end`, in chains. A batch is loaded before any of it is
// combined: beyond the end its last element is loaded again, so that no load waits for a comparison.
template <class LOAD> DEVICE void walk(Value (&total)[WIDTH], u32 first, u32 end, u32 stride, LOAD&& load) {
  const u32 count = first < end ? (end - first + stride - 1) / stride : 0;
  Value part[WIDTH];
  reset(total);
  reset(part);
  for (u32 done = 0; done < count; done += BATCH) {
    Value v[BATCH][WIDTH];
#pragma unroll
    for (int b = 0; b < BATCH; ++b) load(first + min(done + b, count - 1) * stride, v[b]);
#pragma unroll
    for (int b = 0; b < BATCH; ++b)
      if (done + b < count) combine(part, v[b]);
    if ((done + BATCH) % CHAIN == 0) {
      combine(total, part);
      reset(part);
    }
  }
  combine(total, part);
}

// Whether this block is the last of those that share tile `tile`. What the others left is visible to it. All threads call it.
template <class PARAMS> DEVICE bool comes_last(const PARAMS& p, u32 tile) {
  if constexpr (SPLIT) {
    __shared__ u32 before;
    __syncthreads();
    if (threadIdx.x == 0) {
      fence_gpu();  // what the block wrote is visible before it is counted
      before = atomicAdd(p.arrived + tile, 1u);
      fence_gpu();  // the others were counted before what they wrote is read
      if (before == p.splits - 1) p.arrived[tile] = 0;  // as the next run finds it
    }
    __syncthreads();
    return before == p.splits - 1;
  }
  return true;
}
