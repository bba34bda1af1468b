// Emulates kernels/ptx/matrix_store.cuh.
#pragma once
EMULATED void store_matrix_x4(u32 address, const u32 (&r)[4]) { emulator::store_matrices(address, r, EMULATOR_HERE); }
