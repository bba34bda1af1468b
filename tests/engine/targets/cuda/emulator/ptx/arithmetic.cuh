// Emulates kernels/ptx/arithmetic.cuh.
#pragma once
inline float exp2_approx(float x) { return exp2f(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float max_nan(float a, float b) { return a > b || a != a ? a : b; }
inline float min_nan(float a, float b) { return a < b || a != a ? a : b; }
inline u32 unknown(u32 x) { return x; }
