// Emulates kernels/ptx/mma_short.cuh: the longer instruction with nothing in the second half of k.
#pragma once
#include "ptx/mma.cuh"
inline void mma_f16_1688(float (&d)[4], u32 a0, u32 a1, u32 b) { mma_f16_16816(d, {a0, a1, 0, 0}, b, 0); }
inline void mma_bf16_1688(float (&d)[4], u32 a0, u32 a1, u32 b) { mma_bf16_16816(d, {a0, a1, 0, 0}, b, 0); }
