// Emulates kernels/ptx/wgmma_panels.cuh, and `wgmma<N, T>` with A in registers, which are read when the product is waited for.
#pragma once
#include "ptx/wgmma.cuh"
template <int ROW_BYTES> u64 panel_descriptor(u32 address, u32 pitch) {
  return (ROW_BYTES == 128 ? 1ull : 2ull) << 62 | static_cast<u64>(8 * ROW_BYTES >> 4) << 32 | static_cast<u64>((pitch & 0x3FFFF) >> 4) << 16 | (address & 0x3FFFF) >> 4;
}
template <int N, class T> EMULATED void wgmma_across(float (&d)[N / 2], u64 a, u64 b, u32 accumulate) {
  emulator::wgmma_across(wgmma_element<T>(), N, d, a, b, accumulate != 0, EMULATOR_HERE);
}
template <int N> void wgmma_keep(u32 (&)[N]) {}
template <int N, class T> EMULATED void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 accumulate) {
  emulator::wgmma_registers(wgmma_element<T>(), N, d, a, b, accumulate != 0, EMULATOR_HERE);
}
