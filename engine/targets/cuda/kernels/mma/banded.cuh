// Rows of a depthwise filter as operand B of mma.sync. k is pixels of an input row that lie side by side, of two channels each; n is four
// neighbouring pixels of the result, of the same two channels. Where the channels agree and the filter's row has a tap between the two
// pixels, its weight stands: a band down the diagonal. With three and five taps, 13 and 11 products of 16 are with zero.
//
// Pixels come in steps of four. A step is a register of B, of which one half is zero, as the lane has one of two channels; unless they
// are EXPANDED, what may be not zero of two registers lies in one.
#pragma once
#include "ptx/mma.cuh"
#include "ptx/mma_short.cuh"
#include "ptx/permute.cuh"
#include "types.cuh"

// The weights of four channels, two pairs: ROWS of the filter, STEPS of pixels. `w` is packed [WORDS / 4][32 lanes][4 words], where
// halves of a lane's words come as [row][pair][step].
template <class T, int ROWS, int STEPS, bool EXPANDED> struct BandedWeights {
  static constexpr int USED = ROWS * STEPS, WORDS = (USED + 3) / 4 * 4;
  u32 word[EXPANDED ? 2 * USED : USED], selector[2];
  DEVICE void load(const T* w, u32 lane) {
    const bool second = lane >> 2 & 1;  // channel of a pair
    selector[0] = second ? 0x1044u : 0x4410u;
    selector[1] = second ? 0x3244u : 0x4432u;
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(w)[32 * i + lane];
      const u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = 4 * i + j;
        if (k >= USED) continue;
        if constexpr (EXPANDED) {
          word[2 * k] = permute_bytes(words[j], selector[0]);
          word[2 * k + 1] = permute_bytes(words[j], selector[1]);
        } else {
          word[k] = words[j];
        }
      }
    }
  }
  DEVICE u32 operand(int row, int pair, int step) const {
    const int half = (row * 2 + pair) * STEPS + step;
    if constexpr (EXPANDED) return word[half];
    else return permute_bytes(word[half / 2], selector[half % 2]);
  }
  // d[pair] += pixels of one step or two (`both`), for 16 places of four results. An operand: the first eight places and the others under
  // a step, then under the next one.
  DEVICE void multiply(float (&d)[2][4], const u32 (&a)[2][4], int row, int step, bool both) const {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const u32 b0 = operand(row, pair, step), b1 = both ? operand(row, pair, step + 1) : 0;
      if constexpr (same<T, half>::value) {
        if (both) mma_f16_16816(d[pair], a[pair], b0, b1);
        else mma_f16_1688(d[pair], a[pair][0], a[pair][1], b0);
      } else {
        if (both) mma_bf16_16816(d[pair], a[pair], b0, b1);
        else mma_bf16_1688(d[pair], a[pair][0], a[pair][1], b0);
      }
    }
  }
};
