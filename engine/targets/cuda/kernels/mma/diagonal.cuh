// The weights of a depthwise filter as operand B of mma.sync: k is two horizontal taps of eight channels, and each tap's weights are
// a diagonal matrix. Seven of eight products are with zero.
#pragma once
#include "ptx/mma.cuh"
#include "ptx/permute.cuh"
#include "types.cuh"

// Where this lane's weight stands among the four halves of its operand, if it has one.
struct DiagonalPlace {
  u32 low, high;  // selectors of bytes
  DEVICE explicit DiagonalPlace(u32 lane) {
    const u32 column = lane / 4;
    const bool mine = column / 2 == (lane & 3), odd = column & 1;
    low = !mine ? 0x4444u : odd ? 0x1044u : 0x4410u;
    high = !mine ? 0x4444u : odd ? 0x3244u : 0x4432u;
  }
};

// The weights of eight channels as operands: WORDS pairs of taps, a multiple of four, of which USED are there.
template <class T, int WORDS, int USED> struct DiagonalWeights {
  u32 operand[2 * USED];
  DEVICE void load(const T* w, const DiagonalPlace& place) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(w)[i];
      const u32 taps[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = 4 * i + j;
        if (k >= USED) continue;
        operand[2 * k] = permute_bytes(taps[j], place.low);
        operand[2 * k + 1] = permute_bytes(taps[j], place.high);
      }
    }
  }
  // d += the pixels `a` times pair of taps i.
  DEVICE void multiply(float (&d)[4], const u32 (&a)[4], int i) const {
    if constexpr (same<T, half>::value) mma_f16_16816(d, a, operand[2 * i], operand[2 * i + 1]);
    else mma_bf16_16816(d, a, operand[2 * i], operand[2 * i + 1]);
  }
};
