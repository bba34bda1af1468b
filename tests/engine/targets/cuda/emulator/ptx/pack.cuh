// Emulates kernels/ptx/pack.cuh.
#pragma once
template <class T> u32 pack_pair(float low, float high) {
  if constexpr (same<T, half>::value) return pack_half2(low, high);
  else return to_bfloat16(low).bits | static_cast<u32>(to_bfloat16(high).bits) << 16;
}
