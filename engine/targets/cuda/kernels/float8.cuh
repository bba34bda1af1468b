// Conversions of e4m3 by integer arithmetic, for architectures without the instructions (ptx/convert.cuh picks).
#pragma once
#include "types.cuh"

DEVICE float float_of_e4m3(e4m3 x) {
  const u32 magnitude = x.bits & 0x7f, sign = static_cast<u32>(x.bits & 0x80) << 24;
  // Exponent and mantissa shifted into place, then rebiased; below the normal numbers that is a product of subnormal fp32.
  const float value = __uint_as_float(magnitude << 20) * 0x1p120f;
  return __uint_as_float(sign | (magnitude == 0x7f ? 0x7fffffffu : __float_as_uint(value)));
}
// To nearest, ties to even; what is beyond the largest number becomes it.
DEVICE e4m3 e4m3_of_float(float x) {
  const u32 bits = __float_as_uint(x), magnitude = bits & 0x7fffffff;
  u32 result;
  if (magnitude > 0x7f800000) result = 0x7f;
  else if (magnitude >= 0x43e00000) result = 0x7e;  // 448
  else if (magnitude < 0x3c800000) result = __float_as_uint(fabsf(x) + 16384.0f) - 0x46800000;  // below 2^-6 steps are 2^-9, as above 2^14 in fp32
  else result = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
  return {static_cast<u8>(result | (bits >> 24 & 0x80))};
}
