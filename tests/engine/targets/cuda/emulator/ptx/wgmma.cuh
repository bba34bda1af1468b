// Emulates kernels/ptx/wgmma.cuh, and `wgmma<N, T>` itself.
#pragma once
template <int ROW_BYTES> u64 operand_descriptor(u32 address) {
  return (ROW_BYTES == 128 ? 1ull : ROW_BYTES == 64 ? 2ull : 3ull) << 62 | static_cast<u64>(8 * ROW_BYTES >> 4) << 32 | 1ull << 16 | (address & 0x3FFFF) >> 4;
}
inline void wgmma_fence() {}
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int PENDING> void wgmma_wait() { emulator::wgmma_wait(PENDING); }
template <int N> void wgmma_settle(float (&)[N]) {}
template <int N> void wgmma_settle(i32 (&)[N]) {}
template <class T> constexpr emulator::Element wgmma_element() {
  return same<T, half>::value ? emulator::Element::HALF : same<T, bfloat16>::value ? emulator::Element::BFLOAT16
       : same<T, e4m3>::value ? emulator::Element::E4M3
       : same<T, i8>::value ? emulator::Element::I8 : emulator::Element::TF32;
}
template <int N, class T> EMULATED void wgmma(float (&d)[N / 2], u64 a, u64 b, u32 accumulate) {
  emulator::wgmma(wgmma_element<T>(), N, d, a, b, accumulate != 0, EMULATOR_HERE);
}
template <int N, class T> EMULATED void wgmma(i32 (&d)[N / 2], u64 a, u64 b, u32 accumulate) {
  emulator::wgmma(wgmma_element<T>(), N, d, a, b, accumulate != 0, EMULATOR_HERE);
}
