// What CUDA C++ gives a kernel, on a CPU. Between runtime.h and the kernel's source, with the folder ptx/ beside this in place of the
// kernels' own ptx/.
#undef INFINITY
#undef NAN
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

using size_t = decltype(sizeof 0);
extern "C" {
#define EMULATOR_MATH(name) float name##f(float); double name(double);
EMULATOR_MATH(acos) EMULATOR_MATH(acosh) EMULATOR_MATH(asin) EMULATOR_MATH(asinh) EMULATOR_MATH(atan) EMULATOR_MATH(atanh)
EMULATOR_MATH(ceil) EMULATOR_MATH(cos) EMULATOR_MATH(cosh) EMULATOR_MATH(erf) EMULATOR_MATH(exp) EMULATOR_MATH(exp2)
EMULATOR_MATH(fabs) EMULATOR_MATH(floor) EMULATOR_MATH(log) EMULATOR_MATH(rint) EMULATOR_MATH(round) EMULATOR_MATH(sin)
EMULATOR_MATH(sinh) EMULATOR_MATH(sqrt) EMULATOR_MATH(tan) EMULATOR_MATH(tanh)
#undef EMULATOR_MATH
#define EMULATOR_MATH(name) float name##f(float, float); double name(double, double);
EMULATOR_MATH(copysign) EMULATOR_MATH(fmax) EMULATOR_MATH(fmin) EMULATOR_MATH(fmod) EMULATOR_MATH(pow)
#undef EMULATOR_MATH
float fmaf(float, float, float);
double fma(double, double, double);
}
inline float abs(float x) { return __builtin_fabsf(x); }
inline double abs(double x) { return __builtin_fabs(x); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(double x) { return __builtin_isinf(x); }

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class To, class From> To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}
inline float __int_as_float(int i) { return bits_as<float>(i); }
inline int __float_as_int(float f) { return bits_as<int>(f); }
inline float __uint_as_float(unsigned i) { return bits_as<float>(i); }
inline unsigned __float_as_uint(float f) { return bits_as<unsigned>(f); }
inline long long __double_as_longlong(double f) { return bits_as<long long>(f); }
inline double __longlong_as_double(long long i) { return bits_as<double>(i); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
template <class T> T __ldg(const T* p) { return *p; }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class A, class B> constexpr auto min(A a, B b) { using T = decltype(a + b); return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b); }
template <class A, class B> constexpr auto max(A a, B b) { using T = decltype(a + b); return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b); }

#define EMULATOR_ATOMIC template <class T> __attribute__((no_sanitize("thread"))) T
#define EMULATOR_TOUCH emulator::access_atomically(p, sizeof *p, __builtin_return_address(0))
EMULATOR_ATOMIC atomicAdd(T* p, T v) { EMULATOR_TOUCH; const T old = *p; *p = old + v; return old; }
EMULATOR_ATOMIC atomicMin(T* p, T v) { EMULATOR_TOUCH; const T old = *p; if (v < old) *p = v; return old; }
EMULATOR_ATOMIC atomicMax(T* p, T v) { EMULATOR_TOUCH; const T old = *p; if (v > old) *p = v; return old; }
EMULATOR_ATOMIC atomicOr(T* p, T v) { EMULATOR_TOUCH; const T old = *p; *p = old | v; return old; }
EMULATOR_ATOMIC atomicExch(T* p, T v) { EMULATOR_TOUCH; const T old = *p; *p = v; return old; }
EMULATOR_ATOMIC atomicCAS(T* p, T compare, T v) { EMULATOR_TOUCH; const T old = *p; if (old == compare) *p = v; return old; }

inline void* memcpy(void* to, const void* from, size_t bytes) { return __builtin_memcpy(to, from, bytes); }

#define threadIdx (emulator::thread)
#define blockIdx (emulator::block)
#define gridDim (emulator::grid)
#define blockDim (emulator::block_size)

inline void __syncthreads() { emulator::sync_block(); }
inline void __syncwarp(unsigned = ~0u) { emulator::sync_warp(); }
template <class T> T emulator_shuffle(T value, int source) {
  static_assert(sizeof(T) <= 8, "");
  unsigned long long bits = 0;
  __builtin_memcpy(&bits, &value, sizeof value);
  bits = emulator::exchange(bits, source);
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T> T __shfl_sync(unsigned, T v, int lane, int width = 32) {
  return emulator_shuffle(v, (emulator::current & (32 - width)) | (lane & (width - 1)));
}
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) { return emulator_shuffle(v, (emulator::current & 31) ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T v, unsigned by) {
  const int lane = emulator::current & 31, from = lane - static_cast<int>(by);
  return emulator_shuffle(v, from < 0 ? lane : from);
}
template <class T> T __shfl_down_sync(unsigned, T v, unsigned by) {
  const int lane = emulator::current & 31, from = lane + static_cast<int>(by);
  return emulator_shuffle(v, from > 31 ? lane : from);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(emulator_shuffle<int>(predicate, lane) != 0) << lane;
  return result;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == ~0u; }
inline size_t __cvta_generic_to_shared(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - emulator::shared_memory);
}
