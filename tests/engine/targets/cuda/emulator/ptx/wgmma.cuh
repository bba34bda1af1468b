// Emulates kernels/ptx/wgmma.cuh, and `wgmma<N, T>` itself: a product happens when it is waited for, every thread computing the
// results that it holds.
#pragma once
template <int ROW_BYTES> u64 operand_descriptor(u32 address) {
  return (ROW_BYTES == 128 ? 1ull : ROW_BYTES == 64 ? 2ull : 3ull) << 62 | static_cast<u64>(8 * ROW_BYTES >> 4) << 32 | 1ull << 16 | (address & 0x3FFFF) >> 4;
}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  auto& fiber = emulator::fibers[emulator::current];
  fiber.products.push_back(std::move(fiber.open_products));
  fiber.open_products.clear();
}
template <int PENDING> void wgmma_wait() { emulator::run_groups(emulator::fibers[emulator::current].products, PENDING); }
template <int N> void wgmma_settle(float (&)[N]) {}

namespace emulator {
// The value of an operand's element. The instruction does not read the 13 low bits of fp32.
inline float operand_value(half x) { return to_float(x); }
inline float operand_value(bfloat16 x) { return to_float(x); }
inline float operand_value(float x) { return __uint_as_float(__float_as_uint(x) & ~0x1fffu); }
inline u32 swizzle_bytes(u64 descriptor) {
  if (descriptor >> 62 == 0) fail("an operand without a swizzle is not emulated");
  return 256u >> (descriptor >> 62);
}
// The 16-byte chunks of a row change places by its number.
inline u32 swizzled_address(u32 linear, u32 row_bytes) { return linear ^ (linear >> 7 & (row_bytes / 16 - 1)) << 4; }
// Element (row, k) of a K-major operand.
template <class T> float operand_at(u64 descriptor, u32 row, u32 k) {
  const u32 row_bytes = swizzle_bytes(descriptor), start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
  const u32 linear = start + row / 8 * stride + row % 8 * row_bytes + sizeof(T) * k;
  T element;
  memcpy(&element, shared_memory + swizzled_address(linear, row_bytes), sizeof element);
  return operand_value(element);
}
}  // namespace emulator
template <int N, class T> void wgmma(float (&d)[N / 2], u64 a, u64 b, u32 accumulate) {
  const u32 thread = threadIdx.x % 128, first_row = thread / 32 * 16 + thread % 32 / 4, first_column = thread % 4 * 2;
  float* out = d;
  emulator::fibers[emulator::current].open_products.push_back([=] {
    for (u32 i = 0; i < N / 2; ++i) {
      const u32 row = first_row + (i & 2 ? 8 : 0), column = i / 4 * 8 + first_column + (i & 1);
      float sum = accumulate ? out[i] : 0.0f;
      for (u32 k = 0; k < 32 / sizeof(T); ++k) sum += emulator::operand_at<T>(a, row, k) * emulator::operand_at<T>(b, column, k);
      out[i] = sum;
    }
  });
}
