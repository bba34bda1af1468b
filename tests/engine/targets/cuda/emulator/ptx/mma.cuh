// Emulates kernels/ptx/mma.cuh: fragments of a warp are exchanged, every lane computes its own results.
#pragma once
namespace emulator {
inline u32 fragments[MAX_THREADS / WARP][WARP][6];
}
// d (16×8) += a (16×K) · b (K×8): a register holds PER_WORD elements, `unpack` gives element i of one.
template <int PER_WORD, class UNPACK> void mma_168(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, UNPACK unpack) {
  constexpr int HALF = 4 * PER_WORD;  // of k
  const int warp = emulator::current / 32, lane = emulator::current % 32;
  auto& all = emulator::fragments[warp];
  for (int i = 0; i < 4; ++i) all[lane][i] = a[i];
  all[lane][4] = b0;
  all[lane][5] = b1;
  emulator::meet_warp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + (i & 1);
    float sum = d[i];
    for (int k = 0; k < 2 * HALF; ++k) {
      const u32 a_word = all[row % 8 * 4 + k % HALF / PER_WORD][row / 8 + 2 * (k / HALF)];
      const u32 b_word = all[column * 4 + k % HALF / PER_WORD][4 + k / HALF];
      sum += unpack(a_word, k % PER_WORD) * unpack(b_word, k % PER_WORD);
    }
    d[i] = sum;
  }
  emulator::meet_warp();
}
inline void mma_f16_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  mma_168<2>(d, a, b0, b1, [](u32 word, int i) { return to_float(half{static_cast<u16>(word >> 16 * i)}); });
}
inline void mma_bf16_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  mma_168<2>(d, a, b0, b1, [](u32 word, int i) { return to_float(bfloat16{static_cast<u16>(word >> 16 * i)}); });
}
// The instruction does not read the 13 low bits.
inline void mma_tf32_1688(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  mma_168<1>(d, a, b0, b1, [](u32 word, int) { return __uint_as_float(word & ~0x1fffu); });
}
