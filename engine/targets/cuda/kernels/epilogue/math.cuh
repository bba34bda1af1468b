// What expressions call beyond the operators of the language. fp32 in, fp32 out; errors are absolute unless said.
#pragma once
#include "ptx/arithmetic.cuh"

template <class T> DEVICE T max_nan(T a, T b) { return a > b || a != a ? a : b; }
template <class T> DEVICE T min_nan(T a, T b) { return a < b || a != a ? a : b; }

// Abramowitz and Stegun 7.1.26, error 1.5e-7: a third of the instructions of erff, and no branch.
DEVICE float erf_approx(float x) {
  const float z = fabsf(x);
  const float t = reciprocal_approx(fmaf(0.3275911f, z, 1.0f));
  const float p = t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, 1.061405429f, -1.453152027f), 1.421413741f), -0.284496736f), 0.254829592f);
  return copysignf(1.0f - p * exp2_approx(-1.44269504f * z * z), x);
}

DEVICE float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-1.44269504f * x)); }

template <class T> DEVICE T sign(T x) { return x > T(0) ? T(1) : x < T(0) ? T(-1) : x; }

// ONNX Mod: the sign of the divisor.
DEVICE float floor_mod(float a, float b) {
  const float r = fmodf(a, b);
  return r != 0.0f && (r < 0.0f) != (b < 0.0f) ? r + b : r;
}
DEVICE double floor_mod(double a, double b) {
  const double r = fmod(a, b);
  return r != 0.0 && (r < 0.0) != (b < 0.0) ? r + b : r;
}
template <class T> DEVICE T floor_mod(T a, T b) {
  if (b == T(0)) return T(0);
  const T r = a % b;
  return r != T(0) && (r < T(0)) != (b < T(0)) ? r + b : r;
}
template <class T> DEVICE T trunc_mod(T a, T b) { return b == T(0) ? T(0) : a % b; }
DEVICE float trunc_mod(float a, float b) { return fmodf(a, b); }
DEVICE double trunc_mod(double a, double b) { return fmod(a, b); }
template <class T> DEVICE T trunc_div(T a, T b) { return b == T(0) ? T(0) : a / b; }

template <class T> DEVICE T integer_power(T base, T exponent) {
  if (exponent < T(0)) return base == T(1) ? T(1) : base == T(-1) ? (exponent & T(1) ? T(-1) : T(1)) : T(0);
  T result = 1;
  for (; exponent != T(0); exponent >>= 1, base *= base)
    if (exponent & T(1)) result *= base;
  return result;
}
