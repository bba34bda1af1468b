// What a norm or a softmax has to know of a row before it can write it, and how parts of a row join: the mean and the squares
// around it (Chan, Golub, LeVeque 1979), or the maximum and the exponentials below it. In the prologue's type: fp32, or fp64.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"

enum class Kind {  // in the order of _KINDS of normalize.py
  LAYER, RMS, L2, SOFTMAX, LOG_SOFTMAX
};
constexpr Kind KIND = static_cast<Kind>(config::kind);
constexpr bool EXPONENTIAL = KIND == Kind::SOFTMAX || KIND == Kind::LOG_SOFTMAX;
using Value = Prologue::value_t;

// `shift`: the mean (0 where the norm has none) or the maximum. `sum`: of squares around it, or of exponentials of x − shift.
struct Statistic { Value shift, sum, count; };

DEVICE Statistic nothing() { return {EXPONENTIAL ? static_cast<Value>(-INFINITY) : Value(0), Value(0), Value(0)}; }

// Results of 16 bits are served by the approximation; its error is that of the product, 2⁻²⁴·|x|.
DEVICE float exponential(float x) {
  if constexpr (config::exact) return expf(x);
  else return exp2_approx(x * 1.44269504f);
}
DEVICE double exponential(double x) { return exp(x); }

// exp(x − maximum), and 1 for a maximum that is infinite: what such a row becomes is decided when it is written.
DEVICE Value weight(Value x, Value maximum) { return x == maximum ? Value(1) : exponential(x - maximum); }

DEVICE Statistic merge(const Statistic& a, const Statistic& b) {
  if constexpr (EXPONENTIAL) {
    const Value shift = b.shift > a.shift ? b.shift : a.shift;
    return {shift, a.sum * weight(a.shift, shift) + b.sum * weight(b.shift, shift), Value(0)};
  } else if constexpr (KIND == Kind::LAYER) {
    const Value count = a.count + b.count;
    if (a.count == Value(0)) return b;
    if (b.count == Value(0)) return a;
    const Value distance = b.shift - a.shift, share = b.count / count;
    return {a.shift + distance * share, a.sum + b.sum + distance * distance * (a.count * share), count};
  } else {
    return {Value(0), a.sum + b.sum, Value(0)};
  }
}

// `count` neighbouring elements of the row join its statistic.
DEVICE void add_elements(Statistic& s, const Value (&v)[WIDTH], u32 count) {
  Statistic part = nothing();
  if constexpr (EXPONENTIAL) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      if (i < count && v[i] > part.shift) part.shift = v[i];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      if (i < count) part.sum += weight(v[i], part.shift);
  } else {
    if constexpr (KIND == Kind::LAYER) {
      part.count = static_cast<Value>(count);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i)
        if (i < count) part.shift += v[i];
      part.shift /= part.count;
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      if (i < count) part.sum += (v[i] - part.shift) * (v[i] - part.shift);
  }
  s = merge(s, part);
}

// One element of a row of which `s` has seen s.count − 1 (Welford 1962); `share` is 1 / s.count.
DEVICE void add_element(Value& shift, Value& sum, Value share, Value x) {
  if constexpr (EXPONENTIAL) {
    const Value distance = x - shift, e = x == shift ? Value(1) : exponential(x > shift ? -distance : distance);
    sum = x > shift ? sum * e + Value(1) : sum + e;
    shift = x > shift ? x : shift;
  } else if constexpr (KIND == Kind::LAYER) {
    const Value distance = x - shift;
    shift += distance * share;
    sum += distance * (x - shift);
  } else {
    sum += x * x;
  }
}

// How an element becomes its result.
struct Scaling {
  Value shift, scale;
  DEVICE Value operator()(Value x) const {
    if constexpr (KIND == Kind::SOFTMAX) return exponential(x - shift) * scale;
    else if constexpr (KIND == Kind::LOG_SOFTMAX) return (x - shift) - scale;
    else return (x - shift) * scale;
  }
};
DEVICE Scaling scaling_of(const Params& p, Value shift, Value sum) {
  const Value count = static_cast<Value>(p.count), epsilon = p.epsilon;
  if constexpr (EXPONENTIAL) {
    if (shift == static_cast<Value>(INFINITY)) sum = static_cast<Value>(NAN);  // ∞ − ∞
    return {shift, KIND == Kind::SOFTMAX ? Value(1) / sum : logarithm(sum)};
  } else if constexpr (KIND == Kind::L2) {
    return {Value(0), Value(1) / max_nan(root(sum), epsilon)};
  } else {
    return {shift, inverse_root(sum / count + epsilon)};
  }
}

// The statistics of all threads of the block, joined in the same order everywhere: every thread gets the same result.
template <int THREADS> DEVICE Statistic merge_block(Statistic s) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const Statistic other{__shfl_xor_sync(~0u, s.shift, distance), __shfl_xor_sync(~0u, s.sum, distance),
                          __shfl_xor_sync(~0u, s.count, distance)};
    s = merge(s, other);
  }
  __shared__ Statistic partial[THREADS / 32];
  __syncthreads();  // the last one's reads are over
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = s;
  __syncthreads();
  s = partial[0];
#pragma unroll
  for (int i = 1; i < THREADS / 32; ++i) s = merge(s, partial[i]);
  return s;
}
