// What differs between fp16, bf16 and fp32 operands of attention: how rows come into shared memory, how probabilities meet v, and in
// which registers the result lies. Included by attention_mma.cuh.
#pragma once
#include "epilogue/fragment.cuh"
#include "mma/tile.cuh"
#include "ptx/pack.cuh"

using Operand = MmaOperand<config::operand, config::exact>;
using Element = Operand::Element;
using Fragment = Operand::Fragment;
constexpr bool IS_FP32 = same<Element, float>::value;

// Bytes of a tile's row: 64, or a multiple of 128 (see `swizzled`). As in attention_tiles.py.
constexpr int row_bytes(int features) {
  const int bytes = features * static_cast<int>(sizeof(Element));
  return bytes <= 64 ? 64 : (bytes + 127) / 128 * 128;
}

// Columns N·i … N·i + N − 1 of a fragment's accumulators, counted in registers.
template <int N, int COUNT> DEVICE float (&columns_of(float (&d)[COUNT], int i))[N] { return *reinterpret_cast<float(*)[N]>(&d[N * i]); }

// `count` rows of `features` elements into a swizzled tile of ROWS rows; the rest of the tile becomes zero.
template <int THREADS, int ROWS, int PADDED>
DEVICE void copy_rows(u32 tile, const Element* source, i64 stride, u32 count, u32 features) {
  constexpr int PER_CHUNK = Operand::PER_CHUNK, CHUNKS = PADDED / PER_CHUNK, PASSES = (ROWS * CHUNKS + THREADS - 1) / THREADS;
#pragma unroll(config::access < 16 ? 1 : PASSES > 8 ? 4 : PASSES)  // many addresses at once would spill
  for (int i = 0; i < PASSES; ++i) {
    const u32 index = i * THREADS + threadIdx.x, row = index / CHUNKS, chunk = index % CHUNKS, column = PER_CHUNK * chunk;
    if (ROWS * CHUNKS % THREADS != 0 && index >= ROWS * CHUNKS) break;
    const u32 left = row < count && column < features ? features - column : 0;
    copy_chunk<Operand, config::access>(tile + swizzled<row_bytes(PADDED)>(row, chunk), source + row * stride + column, left);
  }
}

// out += p · v: the probabilities of KEYS keys, as they lie in the accumulators of the scores, and a tile of v.
// 16-bit operands: the accumulators of 16 keys are, rounded, operand A.
template <class OPERAND, int FRAGMENTS, int KEYS, int VALUE>
DEVICE void add_values_16(float (&out)[FRAGMENTS][VALUE / 2], const float (&s)[FRAGMENTS][KEYS / 2], u32 tile) {
#pragma unroll
  for (int i = 0; i < KEYS / 16; ++i) {
    typename OPERAND::Fragment a[FRAGMENTS];
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
      for (int r = 0; r < 4; ++r) a[f].word[r] = pack_pair<typename OPERAND::Element>(s[f][8 * i + 2 * r], s[f][8 * i + 2 * r + 1]);
#pragma unroll
    for (int j = 0; j < VALUE / 16; ++j) {
      typename OPERAND::Fragment b[1];
      OPERAND::template load_b<false, row_bytes(VALUE)>(b[0], tile, 16 * j, i);
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) OPERAND::template multiply<1>(columns_of<8>(out[f], j), a[f], b);
    }
  }
}

// fp32: the accumulators of 8 keys are operand A if its column c stands for key 2c and column c + 4 for key 2c + 1. In v four
// neighbouring features are then read at once, for four 8-column blocks: column c of block b of a group of 32 features is feature
// 4c + b, so a lane ends up with eight neighbouring ones. If `exact`, the
// instruction sums over a tile's keys only (see MmaOperand::multiply).
template <class OPERAND, int FRAGMENTS, int KEYS, int VALUE>
DEVICE void add_values_32(float (&out)[FRAGMENTS][VALUE / 2], const float (&s)[FRAGMENTS][KEYS / 2], u32 tile) {
  constexpr int ORDER[4] = {0, 2, 1, 3}, ROW = row_bytes(VALUE);
  const u32 lane = threadIdx.x & 31;
  typename OPERAND::Fragment a[FRAGMENTS][KEYS / 8];
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
    for (int i = 0; i < KEYS / 8; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) a[f][i].word[r] = __float_as_uint(s[f][4 * i + ORDER[r]]);
      OPERAND::round(a[f][i]);
    }
#pragma unroll
  for (int j = 0; j < VALUE / 32; ++j) {
    float sum[FRAGMENTS][16];
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
      for (int i = 0; i < 16; ++i) sum[f][i] = config::exact ? 0.0f : out[f][16 * j + i];
#pragma unroll
    for (int i = 0; i < KEYS / 8; ++i) {
      const u32 key = 8 * i + 2 * (lane & 3);
      const uint4 even = load_shared_16(tile + swizzled<ROW>(key, 8 * j + lane / 4));
      const uint4 odd = load_shared_16(tile + swizzled<ROW>(key + 1, 8 * j + lane / 4));
      typename OPERAND::Fragment b[2] = {{{even.x, odd.x, even.y, odd.y}}, {{even.z, odd.z, even.w, odd.w}}};
      OPERAND::round(b[0]);
      OPERAND::round(b[1]);
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f) OPERAND::template accumulate<2>(sum[f], a[f][i], b);
    }
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
      for (int i = 0; i < 16; ++i) out[f][16 * j + i] = config::exact ? out[f][16 * j + i] + sum[f][i] : sum[f][i];
  }
}

template <class OPERAND, int FRAGMENTS, int KEYS, int VALUE>
DEVICE void add_values(float (&out)[FRAGMENTS][VALUE / 2], const float (&s)[FRAGMENTS][KEYS / 2], u32 tile) {
  if constexpr (OPERAND::PER_CHUNK == 4) add_values_32<OPERAND, FRAGMENTS, KEYS, VALUE>(out, s, tile);
  else add_values_16<OPERAND, FRAGMENTS, KEYS, VALUE>(out, s, tile);
}

// Hands a fragment's 16 rows to the epilogue. Arguments as of `emit_fragment`.
template <class EPILOGUE, int VALUE>
DEVICE void emit_values(const Params& p, const float (&out)[VALUE / 2], u32 first_row, u32 row, u32 rows, u32 column, u32 columns) {
  constexpr int AHEAD = VALUE <= 64 ? VALUE / 16 : VALUE <= 128 ? 2 : 1;  // wide heads leave few registers for what the epilogue reads
  emit_fragment<EPILOGUE, VALUE / 8, AHEAD, IS_FP32 ? Arrangement::STRIDE_4 : Arrangement::BLOCKS>(p, out, first_row, row, rows, column, columns);
}
