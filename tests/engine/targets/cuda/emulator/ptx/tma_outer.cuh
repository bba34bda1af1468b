// Emulates kernels/ptx/tma_outer.cuh.
#pragma once
#include "ptx/tma.cuh"
EMULATED void copy_box(u32 destination, const TensorMap& map, u32 barrier, u32 column, u32 row, u32 inner, u32 outer) {
  emulator::copy_box(destination, map, barrier, column, row, inner, outer, EMULATOR_HERE);
}
