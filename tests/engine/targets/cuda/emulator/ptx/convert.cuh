// Emulates kernels/ptx/convert.cuh.
#pragma once
#include "float8.cuh"
inline float to_float(bfloat16 h) { return __int_as_float(static_cast<int>(static_cast<u32>(h.bits) << 16)); }
inline float to_float(half h) { return static_cast<float>(bits_as<_Float16>(h.bits)); }
inline half to_half(float f) { return {bits_as<u16>(static_cast<_Float16>(f))}; }
inline bfloat16 to_bfloat16(float f) {
  const u32 bits = __float_as_uint(f);
  if (f != f) return {static_cast<u16>(0x7fff)};
  return {static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline u32 pack_half2(float low, float high) { return to_half(low).bits | static_cast<u32>(to_half(high).bits) << 16; }
inline float to_float(e4m3 x) { return float_of_e4m3(x); }
inline e4m3 to_e4m3(float f) { return e4m3_of_float(f); }
inline u16 pack_e4m3x2(float low, float high) { return static_cast<u16>(to_e4m3(low).bits | to_e4m3(high).bits << 8); }
inline u32 halves_of_e4m3x2(u16 pair) { return pack_half2(to_float(e4m3{static_cast<u8>(pair)}), to_float(e4m3{static_cast<u8>(pair >> 8)})); }
inline u32 halves_of_i8x2(u16 pair) { return pack_half2(static_cast<i8>(pair), static_cast<i8>(pair >> 8)); }
inline u32 round_to_tf32(float x) {
  const u32 bits = __float_as_uint(x);
  return (bits & 0x7f800000) == 0x7f800000 ? bits : (bits + 0x1000) & ~0x1fffu;
}
