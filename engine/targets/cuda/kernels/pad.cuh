// Padding in every mode, negative pads too: a thread copies an element of the result from the place that its index along every
// axis names in the source. An element is a unit of 1 to 16 bytes: pad.py takes the largest that divides everything.
#pragma once
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

using Element = config::element;
constexpr int AXES = config::axes;  // innermost last

enum class Mode {  // in the order of engine.ir.ops.PadMode
  CONSTANT, REFLECT, EDGE, WRAP
};
constexpr Mode MODE = static_cast<Mode>(config::mode);

// The index in a source of `size` elements that stands for one outside of it.
DEVICE int index_within(int i, int size) {
  if constexpr (MODE == Mode::EDGE) return i < 0 ? 0 : size - 1;
  const int period = MODE == Mode::WRAP ? size : 2 * (size - 1);
  if (period == 0) return 0;  // a single element is its own reflection
  int m = i % period;
  if (m < 0) m += period;
  return m < size ? m : period - m;
}

template <class T> DEVICE T fill(const Params& p) {
  if constexpr (sizeof(T) <= 8) {
    return static_cast<T>(p.fill[0]);
  } else {
    const u64 low = p.fill[0], high = p.fill[1];
    return make_uint4(static_cast<u32>(low), static_cast<u32>(low >> 32), static_cast<u32>(high), static_cast<u32>(high >> 32));
  }
}

extern "C" __global__ void __launch_bounds__(config::threads, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  for (u32 index = blockIdx.x * config::threads + threadIdx.x; index < p.elements; index += gridDim.x * config::threads) {
    u32 rest = index;
    i64 from = 0, to = 0;
    bool inside = true;
#pragma unroll
    for (int axis = AXES - 1; axis >= 0; --axis) {
      const u32 outer = axis > 0 ? rest / static_cast<u32>(p.sizes[axis]) : 0;
      const u32 place = rest - outer * static_cast<u32>(p.sizes[axis]);
      rest = outer;
      const int size = static_cast<int>(p.source_sizes[axis]);
      int i = static_cast<int>(place) - static_cast<int>(p.begins[axis]);
      if (static_cast<u32>(i) >= static_cast<u32>(size)) {
        if constexpr (MODE == Mode::CONSTANT) inside = false;
        else i = index_within(i, size);
      }
      from += i * p.source_strides[axis];
      to += place * p.strides[axis];
    }
    p.y[to] = inside ? p.x[from] : fill<Element>(p);
  }
  stamp_end(p.stamp);
}
