// Emulates kernels/ptx/bounds.cuh.
#pragma once
#include "ptx/convert.cuh"
template <class T> T rounded_to(float x) {
  if constexpr (same<T, half>::value) return to_half(x);
  else return to_bfloat16(x);
}
template <class T> u32 pack_from_zero(float low, float high) {
  const auto one = [](float x) { return static_cast<u32>(rounded_to<T>(x > 0.0f || x != x ? x : 0.0f).bits); };
  return one(low) | one(high) << 16;
}
template <class T> u32 smaller_of_two(u32 a, u32 b) {
  const auto one = [](u32 a, u32 b) {
    const float x = to_float(T{static_cast<u16>(a)}), y = to_float(T{static_cast<u16>(b)});
    return static_cast<u32>(rounded_to<T>(x < y || x != x ? x : y).bits);
  };
  return one(a, b) | one(a >> 16, b >> 16) << 16;
}
