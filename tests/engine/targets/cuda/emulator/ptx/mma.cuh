// Emulates kernels/ptx/mma.cuh.
#pragma once
inline void mma_f16_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulator::mma(emulator::Element::HALF, d, a, b0, b1); }
inline void mma_bf16_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulator::mma(emulator::Element::BFLOAT16, d, a, b0, b1); }
inline void mma_tf32_1688(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { emulator::mma(emulator::Element::TF32, d, a, b0, b1); }
