// Emulates kernels/ptx/permute.cuh.
#pragma once
inline u32 permute_bytes(u32 x, u32 selector) {
  u32 r = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 digit = selector >> 4 * i & 15;
    if (digit < 4) r |= (x >> 8 * digit & 0xFF) << 8 * i;
  }
  return r;
}
