// The way back from accumulators to rows in shared memory. sm_90 on.
#pragma once
#include "types.cuh"

// Four 8×8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, and has of each matrix the elements
// 2 (l % 4) and the next one of row l / 4, as `load_matrix_x4` gives them.
DEVICE void store_matrix_x4(u32 address, const u32 (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
