// What expressions call beyond the operators of the language. fp32 in, fp32 out; errors are absolute unless said.
#pragma once
#include "ptx/arithmetic.cuh"

template <class T> DEVICE T max_nan(T a, T b) { return a > b || a != a ? a : b; }
template <class T> DEVICE T min_nan(T a, T b) { return a < b || a != a ? a : b; }

// One name for both widths.
DEVICE float root(float x) { return sqrtf(x); }
DEVICE double root(double x) { return sqrt(x); }
DEVICE float inverse_root(float x) { return rsqrtf(x); }  // 2 ulp
DEVICE double inverse_root(double x) { return 1.0 / sqrt(x); }
DEVICE float logarithm(float x) { return logf(x); }
DEVICE double logarithm(double x) { return log(x); }

// Abramowitz and Stegun 7.1.26, error 1.5e-7: a third of the instructions of erff, and no branch.
DEVICE float erf_approx(float x) {
  const float z = fabsf(x);
  const float t = reciprocal_approx(fmaf(0.3275911f, z, 1.0f));
  const float p = t * fmaf(t, fmaf(t, fmaf(t, fmaf(t, 1.061405429f, -1.453152027f), 1.421413741f), -0.284496736f), 0.254829592f);
  return copysignf(1.0f - p * exp2_approx(-1.44269504f * z * z), x);
}

// x Φ(x), Φ the normal distribution's, for results of 16 bits: relative error below 2^-14 for x > −5.7, absolute below 2^-37 beyond.
// log2 Φ(−t) is close to a parabola: a polynomial of degree 6 (least maximum over 0 … 5.7, by weighted least squares) and one
// exponential, a third of what erf takes.
DEVICE float gelu_narrow(float x) {
  const float t = fminf(fabsf(x), 16.0f);  // beyond, the exponential is 0 beside x
  const float below = exp2_approx(fmaf(t, fmaf(t, fmaf(t, fmaf(t, fmaf(t, fmaf(t, 2.4862684e-5f, -6.4112537e-4f), 7.3746652e-3f),
                                  -5.1673207e-2f), -0.46067742f), -1.1504364f), -1.0000461f));
  return fmaf(-t, below, max_nan(x, 0.0f));
}

DEVICE float sigmoid(float x) { return reciprocal_approx(1.0f + exp2_approx(-1.44269504f * x)); }

// x · sigmoid(x) of several numbers, for results of 16 bits: −2^-57 below −43, where x is nothing in 16 bits beside others. Two share a
// reciprocal, that of the product of what each would be divided by, since one takes as long as eight multiplications. That product is
// finite, also where one of the two is NaN.
template <int N> DEVICE void silu_all(float (&x)[N]) {
  constexpr float LEAST = -43.0f, LOG2_E = 1.44269504f;
#pragma unroll
  for (int i = 0; i + 1 < N; i += 2) {
    const float low = max_nan(x[i], LEAST), high = max_nan(x[i + 1], LEAST);
    const float a = 1.0f + exp2_approx(fminf(-LOG2_E * low, -LOG2_E * LEAST)), b = 1.0f + exp2_approx(fminf(-LOG2_E * high, -LOG2_E * LEAST));
    const float both = reciprocal_approx(a * b);
    x[i] = low * (both * b);
    x[i + 1] = high * (both * a);
  }
  if constexpr (N % 2 != 0) x[N - 1] *= sigmoid(x[N - 1]);
}

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
DEVICE float trunc_mod(float a, float b) { return fmodf(a, b); }
DEVICE double trunc_mod(double a, double b) { return fmod(a, b); }

// Integers wrap, which the language promises of unsigned ones only.
template <class T> struct unsigned_of { using type = T; };
template <> struct unsigned_of<i32> { using type = u32; };
template <> struct unsigned_of<i64> { using type = u64; };
template <class T> using unsigned_t = typename unsigned_of<T>::type;
template <class T> DEVICE T wrap_add(T a, T b) { return static_cast<T>(static_cast<unsigned_t<T>>(a) + static_cast<unsigned_t<T>>(b)); }
template <class T> DEVICE T wrap_sub(T a, T b) { return static_cast<T>(static_cast<unsigned_t<T>>(a) - static_cast<unsigned_t<T>>(b)); }
template <class T> DEVICE T wrap_mul(T a, T b) { return static_cast<T>(static_cast<unsigned_t<T>>(a) * static_cast<unsigned_t<T>>(b)); }

// By zero: 0. By −1 without a division, which the smallest number does not survive.
template <class T> DEVICE bool is_minus_one(T b) { return T(-1) < T(0) && b == T(-1); }
template <class T> DEVICE T trunc_div(T a, T b) { return b == T(0) ? T(0) : is_minus_one(b) ? wrap_sub(T(0), a) : a / b; }
template <class T> DEVICE T trunc_mod(T a, T b) { return b == T(0) || is_minus_one(b) ? T(0) : a % b; }
template <class T> DEVICE T floor_mod(T a, T b) {
  const T r = trunc_mod(a, b);
  return r != T(0) && (r < T(0)) != (b < T(0)) ? r + b : r;
}

template <class T> DEVICE T integer_power(T base, T exponent) {
  if (exponent < T(0)) return base == T(1) ? T(1) : base == T(-1) ? (exponent & T(1) ? T(-1) : T(1)) : T(0);
  T result = 1;
  for (; exponent != T(0); exponent >>= 1, base = wrap_mul(base, base))
    if (exponent & T(1)) result = wrap_mul(result, base);
  return result;
}

// Shifts by the width or more give 0, or the sign.
template <class T> DEVICE T shift_left(T a, T by) {
  const auto count = static_cast<unsigned_t<T>>(by);
  return count < 8 * sizeof(T) ? static_cast<T>(static_cast<unsigned_t<T>>(a) << count) : T(0);
}
template <class T> DEVICE T shift_right(T a, T by) {
  const auto count = static_cast<unsigned_t<T>>(by);
  return count < 8 * sizeof(T) ? a >> count : a < T(0) ? T(-1) : T(0);
}
