// The k largest or smallest elements along an axis, best first, of equal ones the first. Elements are compared as integers in an
// order that holds for every type (a NaN is larger than any number). For a small k a block walks along a row and keeps the best so
// far sorted in shared memory: it sorts a piece of the row, unless nothing in it is good enough, and merges. For a large k every
// element counts how many are better: that is its place in the result.
#pragma once
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

using Element = config::element;
constexpr int AXES = config::axes, THREADS = config::threads;  // axes of the rows, innermost last
constexpr int CAPACITY = config::capacity;                    // a power of two, at least k; 0: the elements count
constexpr u64 WORST_KEY = ~0ull;
constexpr u32 WORST_PLACE = ~0u;

// An integer that is smaller the better the element is.
template <class T> DEVICE u64 key_of(T element) {
  u64 key;
  if constexpr (same<T, double>::value) {
    const double x = element + 0.0;  // −0 is 0
    long long bits = __double_as_longlong(x);
    if (x != x) bits = 0x7fffffffffffffffll;
    key = bits < 0 ? ~static_cast<u64>(bits) : static_cast<u64>(bits) | 1ull << 63;
  } else if constexpr (same<compute_t<T>, float>::value) {
    const float x = widen(element) + 0.0f;
    u32 bits = __float_as_uint(x);
    if (x != x) bits = 0x7fffffffu;
    key = bits >> 31 ? ~bits : bits | 1u << 31;
  } else {
    key = static_cast<u64>(element);
    if constexpr (static_cast<T>(-1) < static_cast<T>(0)) key ^= 1ull << 63;  // sign-extended
  }
  return config::largest ? ~key : key;
}
DEVICE bool is_better(u64 key, u32 place, u64 other_key, u32 other_place) {
  return key < other_key || (key == other_key && place < other_place);
}

struct Rows { i64 x, values, places; };  // where a row begins

DEVICE Rows row_at(const Params& p, u32 row) {
  Rows rows = {};
#pragma unroll
  for (int axis = AXES - 1; axis >= 0; --axis) {
    const u32 size = static_cast<u32>(p.sizes[axis]), outer = axis > 0 ? row / size : 0, place = row - outer * size;
    row = outer;
    rows.x += place * p.x_strides[axis];
    rows.values += place * p.values_strides[axis];
    rows.places += place * p.places_strides[axis];
  }
  return rows;
}
DEVICE void write(const Params& p, const Rows& row, u32 rank, u32 place) {
  p.values[row.values + rank * p.values_along] = p.x[row.x + place * p.x_along];
  p.places[row.places + rank * p.places_along] = place;
}

// CAPACITY items in order by all threads; MERGE: they rise and then fall (a bitonic sequence), which takes one round.
template <bool MERGE> DEVICE void sort(u64* keys, u32* places) {
  for (int size = MERGE ? CAPACITY : 2; size <= CAPACITY; size *= 2)
    for (int stride = size / 2; stride > 0; stride /= 2) {
      for (int t = threadIdx.x; t < CAPACITY / 2; t += THREADS) {
        const int i = 2 * t - (t & (stride - 1)), j = i + stride;
        const bool rises = MERGE || (i & size) == 0 || size == CAPACITY;
        if (is_better(keys[j], places[j], keys[i], places[i]) == rises) {
          const u64 key = keys[i];
          const u32 place = places[i];
          keys[i] = keys[j], places[i] = places[j];
          keys[j] = key, places[j] = place;
        }
      }
      __syncthreads();
    }
}

template <int ITEMS> DEVICE void keep_best(const Params& p, const Rows& row) {
  __shared__ u64 keys[2 * ITEMS];
  __shared__ u32 places[2 * ITEMS];
  __shared__ int found;
  for (u32 base = 0; base < p.n; base += ITEMS) {
    const u32 piece = base == 0 ? 0 : ITEMS;  // behind the best so far
    if (threadIdx.x == 0) found = base == 0;
    for (u32 i = threadIdx.x; i < ITEMS; i += THREADS) {
      const bool exists = base + i < p.n;
      keys[piece + i] = exists ? key_of(p.x[row.x + (base + i) * p.x_along]) : WORST_KEY;
      places[piece + i] = exists ? base + i : WORST_PLACE;
    }
    __syncthreads();
    if (base > 0) {
      for (u32 i = threadIdx.x; i < ITEMS; i += THREADS)
        if (is_better(keys[ITEMS + i], places[ITEMS + i], keys[p.k - 1], places[p.k - 1])) found = 1;
      __syncthreads();
    }
    const bool worth_it = found;
    __syncthreads();  // `found` is written again
    if (!worth_it) continue;
    sort<false>(keys + piece, places + piece);
    if (base > 0) {
      // The best half of both: each of the best so far against the piece's from its end.
      for (u32 i = threadIdx.x; i < ITEMS; i += THREADS) {
        const u32 other = 2 * ITEMS - 1 - i;
        if (is_better(keys[other], places[other], keys[i], places[i])) keys[i] = keys[other], places[i] = places[other];
      }
      __syncthreads();
      sort<true>(keys, places);
    }
  }
  for (u32 i = threadIdx.x; i < p.k; i += THREADS) write(p, row, i, places[i]);
}

DEVICE void count_better(const Params& p, const Rows& row) {
  __shared__ u64 keys[THREADS];
  const u32 own = blockIdx.x * THREADS + threadIdx.x;
  const u64 key = own < p.n ? key_of(p.x[row.x + own * p.x_along]) : WORST_KEY;
  u32 rank = 0;
  for (u32 base = 0; base < p.n; base += THREADS) {
    const u32 i = base + threadIdx.x;
    keys[threadIdx.x] = i < p.n ? key_of(p.x[row.x + i * p.x_along]) : WORST_KEY;
    __syncthreads();
    const u32 count = min(static_cast<u32>(THREADS), p.n - base);
    for (u32 j = 0; j < count; ++j) rank += is_better(keys[j], base + j, key, own);
    __syncthreads();
  }
  if (own < p.n && rank < p.k) write(p, row, rank, own);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
    __syncthreads();  // all have left the row before
    if constexpr (CAPACITY > 0) keep_best<CAPACITY>(p, row_at(p, row));
    else count_better(p, row_at(p, row));
  }
  stamp_end(p.stamp);
}
