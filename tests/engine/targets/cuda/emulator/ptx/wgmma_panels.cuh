// Emulates kernels/ptx/wgmma_panels.cuh, and `wgmma<N, T>` with A in registers, which are read when the product is waited for.
#pragma once
#include "ptx/wgmma.cuh"
template <int ROW_BYTES> u64 panel_descriptor(u32 address, u32 pitch) {
  return (ROW_BYTES == 128 ? 1ull : 2ull) << 62 | static_cast<u64>(8 * ROW_BYTES >> 4) << 32 | static_cast<u64>((pitch & 0x3FFFF) >> 4) << 16 | (address & 0x3FFFF) >> 4;
}
template <int N> void wgmma_keep(u32 (&)[N]) {}

namespace emulator {
inline u32 register_operands[MAX_THREADS][4];
// Element (k, column) of an operand B whose rows are k.
template <class T> float transposed_at(u64 descriptor, u32 k, u32 column) {
  const u32 row_bytes = swizzle_bytes(descriptor), per_row = row_bytes / sizeof(T);
  const u32 start = (descriptor & 0x3FFF) << 4, pitch = (descriptor >> 16 & 0x3FFF) << 4, atom = (descriptor >> 32 & 0x3FFF) << 4;
  const u32 linear = start + column / per_row * pitch + k / 8 * atom + k % 8 * row_bytes + column % per_row * sizeof(T);
  T element;
  memcpy(&element, shared_memory + swizzled_address(linear, row_bytes), sizeof element);
  return operand_value(element);
}
}  // namespace emulator
template <int N, class T> void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b, u32 accumulate) {
  static_assert(sizeof(T) == 2, "");
  const u32 first_column = threadIdx.x % 4 * 2;
  float* out = d;
  const u32* words = a;
  auto& groups = emulator::fibers[emulator::current].open_products;
  // A thread needs the registers of its quad: each publishes its own, and computes once all of its warp have.
  groups.push_back([=] {
    const int self = emulator::current;
    memcpy(emulator::register_operands[self], words, sizeof emulator::register_operands[self]);
    emulator::meet_warp();
    for (u32 i = 0; i < N / 2; ++i) {
      const u32 lower = i & 2 ? 1 : 0, column = i / 4 * 8 + first_column + (i & 1);
      float sum = accumulate ? out[i] : 0.0f;
      for (u32 k = 0; k < 16; ++k) {
        const u32 word = emulator::register_operands[self / 4 * 4 + static_cast<int>(k % 8 / 2)][lower + 2 * (k / 8)];
        T element{static_cast<u16>(k & 1 ? word >> 16 : word)};
        sum += emulator::operand_value(element) * emulator::transposed_at<T>(b, k, column);
      }
      out[i] = sum;
    }
    emulator::meet_warp();
  });
}
