// Emulates kernels/ptx/tma.cuh.
#pragma once
using TensorMap = emulator::Map;
inline void prefetch_tensor_map(const TensorMap&) {}
EMULATED void copy_box(u32 destination, const TensorMap& map, u32 barrier, u32 column, u32 row) {
  emulator::copy_box(destination, map, barrier, column, row, 0, 0, EMULATOR_HERE);
}
