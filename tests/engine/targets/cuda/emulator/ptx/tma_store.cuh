// Emulates kernels/ptx/tma_store.cuh.
#pragma once
#include "ptx/tma.cuh"
EMULATED void store_box(const TensorMap& map, u32 source, u32 column, u32 row) { emulator::store_box(source, map, column, row, EMULATOR_HERE); }
inline void store_box_commit() { emulator::store_box_commit(); }
template <int PENDING> void store_box_wait_read() { emulator::store_box_wait(PENDING); }
inline void store_box_wait() { emulator::store_box_wait(0); }
