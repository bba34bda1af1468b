// fp32 instructions that the language has no function for. Errors are relative.
#pragma once
#include "types.cuh"

DEVICE float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }  // 2 ulp
DEVICE float reciprocal_approx(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }  // 1 ulp
// The other maximum and minimum: of a NaN and a number they are NaN.
DEVICE float max_nan(float a, float b) { float y; asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b)); return y; }
DEVICE float min_nan(float a, float b) { float y; asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b)); return y; }

// x itself, as a number that the compiler knows nothing of: it computes again what comes of it, instead of keeping that in registers.
DEVICE u32 unknown(u32 x) {
  asm volatile("" : "+r"(x));
  return x;
}
