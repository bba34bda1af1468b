// Scalar types and their conversions. Everything includes this; it includes nothing, so that a kernel compiles without the
// headers of the CUDA toolkit (in a tenth of the time, from an image without them).
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i8 = signed char;
using i16 = short;
using i32 = int;
using i64 = long long;

#define DEVICE __device__ __forceinline__
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)

struct half { u16 bits; };
struct bfloat16 { u16 bits; };
struct e4m3 { u8 bits; };  // 1 sign, 4 exponent, 3 mantissa; 448 at most, no infinities

template <class A, class B> struct same { static constexpr bool value = false; };
template <class A> struct same<A, A> { static constexpr bool value = true; };
template <bool CONDITION, class A, class B> struct choose { using type = A; };
template <class A, class B> struct choose<false, A, B> { using type = B; };

#include "ptx/convert.cuh"

// The type an element is computed in: floats in fp32, narrow integers in int.
template <class T> struct compute { using type = T; };
template <> struct compute<half> { using type = float; };
template <> struct compute<bfloat16> { using type = float; };
template <> struct compute<e4m3> { using type = float; };
template <> struct compute<u8> { using type = int; };
template <> struct compute<u16> { using type = int; };
template <> struct compute<i8> { using type = int; };
template <> struct compute<i16> { using type = int; };
template <class T> using compute_t = typename compute<T>::type;

template <class T> DEVICE compute_t<T> widen(T x) {
  if constexpr (same<T, half>::value || same<T, bfloat16>::value || same<T, e4m3>::value) return to_float(x);
  else return static_cast<compute_t<T>>(x);
}
template <class T, class V> DEVICE T narrow(V x) {
  if constexpr (same<T, half>::value) return to_half(static_cast<float>(x));
  else if constexpr (same<T, bfloat16>::value) return to_bfloat16(static_cast<float>(x));
  else if constexpr (same<T, e4m3>::value) return to_e4m3(static_cast<float>(x));
  else return static_cast<T>(x);
}
