// Updates put, or added, … where indices say: a thread takes one of them, a unit of up to 16 bytes where it only replaces. Where a
// place is named twice, the order is the hardware's: a sum of floats may differ in its last bits between runs.
#pragma once
#include "epilogue/access.cuh"
#include "ptx/grid.cuh"
#include "scheduler/group_reduce.cuh"
#include "scheduler/stamp.cuh"

using Element = config::element;
constexpr int AXES = config::axes, DEPTH = config::depth;  // axes of the updates, innermost last; indices for a place

template <class T> constexpr bool has_atomic_sum() {
  return same<T, float>::value || same<T, double>::value || same<T, i32>::value || same<T, u32>::value;
}

// Combines an element in memory with an update, at once for all other threads; without an operation it is replaced. Elements of
// less than 32 bits are part of a word.
template <class OPERATION, class T> DEVICE void combine(T* place, T update) {
  if constexpr (same<OPERATION, void>::value) {
    *place = update;
  } else if constexpr (same<OPERATION, Sum>::value && has_atomic_sum<T>()) {
    atomicAdd(place, update);
  } else {
    using Word = typename choose<sizeof(T) == 8, u64, u32>::type;
    const u64 address = reinterpret_cast<u64>(place), inside = address % sizeof(Word);
    Word* word = reinterpret_cast<Word*>(address - inside);
    Word mask = ~Word(0), seen = *word, expected;
    if constexpr (sizeof(T) < sizeof(Word)) mask = ((Word(1) << 8 * sizeof(T)) - 1) << 8 * inside;
    do {
      expected = seen;
      const Word bits = expected >> 8 * inside;
      T old;
      memcpy(&old, &bits, sizeof(T));
      const T next = narrow<T>(OPERATION::of(widen(old), widen(update)));
      Word next_bits = 0;
      memcpy(&next_bits, &next, sizeof(T));
      seen = atomicCAS(word, expected, (expected & ~mask) | next_bits << 8 * inside);
    } while (seen != expected);
  }
}

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  for (u32 index = blockIdx.x * config::threads + threadIdx.x; index < p.elements; index += gridDim.x * config::threads) {
    u32 rest = index;
    i64 from = 0, by = 0, to = 0;
#pragma unroll
    for (int axis = AXES - 1; axis >= 0; --axis) {
      const u32 size = static_cast<u32>(p.sizes[axis]), outer = axis > 0 ? rest / size : 0, place = rest - outer * size;
      rest = outer;
      from += place * p.update_strides[axis];
      by += place * p.index_strides[axis];
      to += place * p.strides[axis];
    }
#pragma unroll
    for (int i = 0; i < DEPTH; ++i)
      to += row_within(static_cast<i64>(p.indices[by + i * p.component]), p.rows[i], p.status) * p.row_strides[i];
    combine<config::operation>(p.y + to, p.updates[from]);
  }
  stamp_end(p.stamp);
}
