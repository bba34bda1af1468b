// What CUDA C++ gives a kernel, on a CPU: threads of a block as fibers, barriers, shuffles, shared memory. Included in front of
// a kernel's source by emulator.py, with the folder ptx/ beside this in place of the kernels' own ptx/.
//
// Blocks run one after the other. A fiber runs until it has to wait, in one of two orders, from the first thread on or from the
// last: a result that depends on which thread comes first differs. Asynchronous copies and matrix products take effect as late
// as the kernel's own waits allow.
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <functional>
#include <vector>

#undef INFINITY
#undef NAN
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

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
  memcpy(&to, &from, sizeof to);
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

template <class T> T atomicAdd(T* p, T v) { const T old = *p; *p = old + v; return old; }
template <class T> T atomicMin(T* p, T v) { const T old = *p; if (v < old) *p = v; return old; }
template <class T> T atomicMax(T* p, T v) { const T old = *p; if (v > old) *p = v; return old; }
template <class T> T atomicOr(T* p, T v) { const T old = *p; *p = old | v; return old; }
template <class T> T atomicExch(T* p, T v) { const T old = *p; *p = v; return old; }
template <class T> T atomicCAS(T* p, T compare, T v) { const T old = *p; if (old == compare) *p = v; return old; }

namespace emulator {

constexpr int MAX_THREADS = 1024, STACK_BYTES = 256 << 10, WARP = 32;
constexpr size_t SHARED_BYTES = 256 << 10;
struct Index { unsigned x, y, z; };
alignas(1024) unsigned char shared_memory[SHARED_BYTES];

[[noreturn]] inline void fail(const char* what);

struct CopyGroup { std::vector<std::function<void()>> copies; };
struct Fiber {
  void* stack_pointer;
  unsigned char* stack;
  bool done;
  std::vector<std::function<void()>> open_copies, open_products;
  std::vector<std::vector<std::function<void()>>> copies, products;  // committed groups, oldest first
};
struct Meeting { int arrived; unsigned generation; };

inline Fiber fibers[MAX_THREADS];
inline Index thread, block, grid, block_size;
inline int threads, alive, current;
inline bool last_first;  // the order in which threads take their turns
inline unsigned long long progress;  // counts what may free a waiting thread
inline void* scheduler_stack;
inline Meeting block_meeting, warp_meetings[MAX_THREADS / WARP], named_meetings[16];
inline unsigned long long exchange[MAX_THREADS / WARP][WARP];
inline char* message;

#if defined(__x86_64__)
// Saves the callee's registers and the stack pointer, and goes on where `to` was saved.
asm(R"(
.text
.local emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void emulator_switch(void** from, void* to);
#else
#error "the emulator switches stacks in x86-64 assembly"
#endif

inline void yield() {
  const int self = current;
  emulator_switch(&fibers[self].stack_pointer, scheduler_stack);
}

inline void wait_until(const std::function<bool()>& ready) { while (!ready()) yield(); }

// Returns when `expected` threads have come. `expected` is asked anew: threads that end no longer take part.
template <class COUNT> void meet(Meeting& meeting, COUNT expected) {
  const unsigned generation = meeting.generation;
  ++meeting.arrived;
  ++progress;
  while (meeting.generation == generation) {
    if (meeting.arrived >= expected()) {
      meeting.arrived = 0;
      ++meeting.generation;
      ++progress;
      break;
    }
    yield();
  }
}
inline void meet_warp() { meet(warp_meetings[current / WARP], [] { return min(WARP, threads - current / WARP * WARP); }); }

template <class T> T shuffle(T value, int source) {
  static_assert(sizeof(T) <= 8, "");
  unsigned long long bits = 0;
  memcpy(&bits, &value, sizeof value);
  const int warp = current / WARP;
  exchange[warp][current % WARP] = bits;
  meet_warp();
  T result;
  memcpy(&result, &exchange[warp][source], sizeof result);
  meet_warp();
  return result;
}

void run_thread();  // calls the kernel

[[noreturn]] inline void fiber_entry() {
  run_thread();
  fibers[current].done = true;
  --alive;
  ++progress;
  yield();
  abort();
}

inline void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack = static_cast<unsigned char*>(malloc(STACK_BYTES));
  // As `emulator_switch` leaves a stack: six registers, then the address to go on at. The ABI wants the stack at 16 n + 8 there.
  auto top = reinterpret_cast<uintptr_t>(fiber.stack + STACK_BYTES) & ~uintptr_t(63);
  void** stack = reinterpret_cast<void**>(top - 16);
  *stack = reinterpret_cast<void*>(&fiber_entry);
  stack -= 6;
  memset(stack, 0, 6 * sizeof *stack);
  fiber.stack_pointer = stack;
  fiber.done = false;
  fiber.open_copies.clear();
  fiber.open_products.clear();
  fiber.copies.clear();
  fiber.products.clear();
}

struct Failure {};
[[noreturn]] inline void fail(const char* what) {
  snprintf(message, 256, "thread %d of block (%u, %u, %u): %s", current, block.x, block.y, block.z, what);
  ++progress;
  for (;;) { alive = -1; yield(); }
}

// Runs every thread of the present block to its end; false where none can go on.
inline bool run_block() {
  block_meeting = {};
  for (auto& meeting : warp_meetings) meeting = {};
  for (auto& meeting : named_meetings) meeting = {};
  memset(shared_memory, 0xFF, SHARED_BYTES);  // reads NaN until written
  alive = threads;
  for (int i = 0; i < threads; ++i) prepare(fibers[i]);
  while (alive > 0) {
    const unsigned long long before = progress;
    for (int turn = 0; turn < threads; ++turn) {
      const int i = last_first ? threads - 1 - turn : turn;
      if (fibers[i].done) continue;
      current = i;
      thread = {static_cast<unsigned>(i), 0, 0};
      emulator_switch(&scheduler_stack, fibers[i].stack_pointer);
      if (alive < 0) return false;
    }
    if (alive > 0 && progress == before) {
      snprintf(message, 256, "block (%u, %u, %u): %d threads wait for ever", block.x, block.y, block.z, alive);
      return false;
    }
  }
  return true;
}

inline void run_groups(std::vector<std::vector<std::function<void()>>>& groups, size_t pending) {
  while (groups.size() > pending) {
    for (auto& work : groups.front()) work();
    groups.erase(groups.begin());
  }
}

}  // namespace emulator

#define threadIdx (emulator::thread)
#define blockIdx (emulator::block)
#define gridDim (emulator::grid)
#define blockDim (emulator::block_size)

inline void __syncthreads() { emulator::meet(emulator::block_meeting, [] { return emulator::alive; }); }
inline void __syncwarp(unsigned = ~0u) { emulator::meet_warp(); }
template <class T> T __shfl_sync(unsigned, T v, int lane) { return emulator::shuffle(v, lane & 31); }
template <class T> T __shfl_xor_sync(unsigned, T v, int mask) { return emulator::shuffle(v, (emulator::current & 31) ^ mask); }
template <class T> T __shfl_up_sync(unsigned, T v, unsigned by) {
  const int lane = emulator::current & 31, from = lane - static_cast<int>(by);
  return emulator::shuffle(v, from < 0 ? lane : from);
}
template <class T> T __shfl_down_sync(unsigned, T v, unsigned by) {
  const int lane = emulator::current & 31, from = lane + static_cast<int>(by);
  return emulator::shuffle(v, from > 31 ? lane : from);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(emulator::shuffle<int>(predicate, lane) != 0) << lane;
  return result;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == ~0u; }
inline size_t __cvta_generic_to_shared(const void* p) {
  return static_cast<size_t>(static_cast<const unsigned char*>(p) - emulator::shared_memory);
}
