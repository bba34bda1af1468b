// Pairs of 16-bit floats in one register, the first in the low bits, and their bounds. NaN stays what it is.
#pragma once
#include "types.cuh"

// The larger of a number and zero, rounded.
template <class T> DEVICE u32 pack_from_zero(float low, float high);
template <> DEVICE u32 pack_from_zero<half>(float low, float high) {
  u32 r;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <> DEVICE u32 pack_from_zero<bfloat16>(float low, float high) {
  u32 r;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

template <class T> DEVICE u32 smaller_of_two(u32 a, u32 b);
template <> DEVICE u32 smaller_of_two<half>(u32 a, u32 b) {
  u32 r;
  asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <> DEVICE u32 smaller_of_two<bfloat16>(u32 a, u32 b) {
  u32 r;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
