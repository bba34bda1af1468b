// Operands of wgmma whose rows are 64 or 128 bytes (the swizzle of the same name), and products with A in registers. The product
// itself, `wgmma<N, T>` with a register operand, is generated per width (attention_wgmma.py).
#pragma once
#include "ptx/wgmma.cuh"

// A panel: rows of ROW_BYTES, eight of them to an atom. Where k runs along the rows, adding 2 moves 32 bytes along k. Where k counts
// the rows (operand B of a product with A in registers), N may span several panels, `pitch` bytes apart, and 16 of k are two atoms.
template <int ROW_BYTES> DEVICE u64 panel_descriptor(u32 address, u32 pitch) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES == 128, "");
  constexpr u64 SWIZZLE = (ROW_BYTES == 128 ? 1ull : 2ull) << 62, ATOM = 8 * ROW_BYTES >> 4;
  return SWIZZLE | ATOM << 32 | static_cast<u64>((pitch & 0x3FFFF) >> 4) << 16 | (address & 0x3FFFF) >> 4;
}
// Generated (gemm_wgmma.py) where the rows of b are k.
template <int N, class T> DEVICE void wgmma_across(float (&d)[N / 2], u64 a, u64 b, u32 accumulate);
// Keeps a register operand in its registers up to this place, behind the wait for its product.
template <int N> DEVICE void wgmma_keep(u32 (&a)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(a[i])::"memory");
}
