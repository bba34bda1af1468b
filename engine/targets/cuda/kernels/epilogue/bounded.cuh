// Results of 16 bits that end at zero below, and some at a number above. Rounding keeps order, so what has been rounded is bounded, two
// at a time.
#pragma once
#include "epilogue/access.cuh"
#include "ptx/bounds.cuh"

// Two results, rounded and bounded. MOST: the bits of the upper bound, 0 where there is none.
template <class T, u32 MOST> DEVICE u32 bounded_pair(float low, float high) {
  const u32 pair = pack_from_zero<T>(low, high);
  if constexpr (MOST == 0) return pair;
  else return smaller_of_two<T>(pair, MOST << 16 | MOST);
}

// As `store_columns` of aligned neighbours.
template <class T, u32 MOST> DEVICE void store_bounded(const Tensor& t, i64 offset, u32 column, u32 count, const float (&v)[WIDTH]) {
  static_assert(sizeof(T) == 2, "two are a register");
  T* const place = static_cast<T*>(t.data) + offset + column;
  if constexpr (WIDTH == 8) {
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = bounded_pair<T, MOST>(v[2 * i], v[2 * i + 1]);
    store_global_16_if(count > 0, place, make_uint4(words[0], words[1], words[2], words[3]));
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      if (i < count) place[i] = T{static_cast<u16>(bounded_pair<T, MOST>(v[i], v[i]))};
  }
}
