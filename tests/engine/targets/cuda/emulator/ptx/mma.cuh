// Emulates kernels/ptx/mma.cuh: fragments of a warp are exchanged, every lane computes its own results.
#pragma once
namespace emulator {
inline u32 fragments[MAX_THREADS / WARP][WARP][6];
}
// d (16×8) += a (16×16) · b (16×8) with elements unpacked by UNPACK.
template <class UNPACK> void mma_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, UNPACK unpack) {
  const int warp = emulator::current / 32, lane = emulator::current % 32;
  auto& all = emulator::fragments[warp];
  for (int i = 0; i < 4; ++i) all[lane][i] = a[i];
  all[lane][4] = b0;
  all[lane][5] = b1;
  emulator::meet_warp();
  const auto a_at = [&](int row, int k) {
    const u32 word = all[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
    return unpack(static_cast<u16>(k & 1 ? word >> 16 : word));
  };
  const auto b_at = [&](int k, int column) {
    const u32 word = all[column * 4 + k % 8 / 2][4 + k / 8];
    return unpack(static_cast<u16>(k & 1 ? word >> 16 : word));
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + (i & 1);
    float sum = d[i];
    for (int k = 0; k < 16; ++k) sum += a_at(row, k) * b_at(k, column);
    d[i] = sum;
  }
  emulator::meet_warp();
}
inline void mma_f16_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  mma_16816(d, a, b0, b1, [](u16 bits) { return to_float(half{bits}); });
}
