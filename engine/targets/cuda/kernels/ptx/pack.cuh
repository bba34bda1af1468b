// Two fp32 numbers rounded to a pair of 16-bit floats in one register, the first in the low bits.
#pragma once
#include "types.cuh"

template <class T> DEVICE u32 pack_pair(float low, float high);
template <> DEVICE u32 pack_pair<half>(float low, float high) { return pack_half2(low, high); }
template <> DEVICE u32 pack_pair<bfloat16>(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
