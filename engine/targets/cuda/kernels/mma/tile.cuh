// Tiles of matrix operands in shared memory, and the warp's share of a tile product.
//
// A tile's rows are made of 16-byte chunks. Two chunks along k are one step of the matrix instruction whatever the element: 16
// halves or 8 words, so a fragment is four registers for all of them, and where k runs along the tile's rows ldmatrix moves
// words as well as pairs of halves. `MmaOperand` says what else differs between the kinds of operands.
#pragma once
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"

// Byte offset of 16-byte chunk `chunk` of row `row`. The exclusive-or spreads the eight rows that one ldmatrix reads over all
// 32 banks. Rows are 32 or 64 bytes or a multiple of 128.
template <int ROW_BYTES> DEVICE u32 swizzled(u32 row, u32 chunk) {
  static_assert(ROW_BYTES == 32 || ROW_BYTES == 64 || ROW_BYTES % 128 == 0, "");
  return row * ROW_BYTES + ((chunk ^ (ROW_BYTES == 32 ? (row >> 2) & 1 : ROW_BYTES == 64 ? (row >> 1) & 3 : row & 7)) << 4);
}
// The same for words whose rows are k: a warp reads two neighbouring chunks of four rows, word by word.
template <int ROW_BYTES> DEVICE u32 swizzled_words(u32 row, u32 chunk) {
  static_assert(ROW_BYTES == 64 || ROW_BYTES % 128 == 0, "");
  return row * ROW_BYTES + ((chunk ^ (ROW_BYTES == 64 ? row & 2 : (row & 3) << 1)) << 4);
}

// A 16-row operand A at (row, step k) of a row-major tile.
template <int ROW_BYTES> DEVICE void load_a(u32 (&a)[4], u32 tile, u32 row, u32 k) {
  const u32 lane = threadIdx.x & 31;
  load_matrix_x4(a, tile + swizzled<ROW_BYTES>(row + (lane & 15), 2 * k + (lane >> 4)));
}
// The same for halves where the tile's rows are k (A's rows are innermost).
template <int ROW_BYTES> DEVICE void load_a_m_inner(u32 (&a)[4], u32 tile, u32 row, u32 k) {
  const u32 lane = threadIdx.x & 31;
  load_matrix_x4_transposed(a, tile + swizzled<ROW_BYTES>(16 * k + (lane & 7) + ((lane >> 4) << 3), row / 8 + ((lane >> 3) & 1)));
}
// Operand B for two 8-column blocks from `column` on, where the tile's rows are B's columns (k is innermost):
// b[0], b[1] for the first block, b[2], b[3] for the second.
template <int ROW_BYTES> DEVICE void load_b_k_inner(u32 (&b)[4], u32 tile, u32 column, u32 k) {
  const u32 lane = threadIdx.x & 31;
  load_matrix_x4(b, tile + swizzled<ROW_BYTES>(column + (lane & 7) + ((lane >> 4) << 3), 2 * k + ((lane >> 3) & 1)));
}
// The same for halves where the tile's rows are k (B's columns are innermost).
template <int ROW_BYTES> DEVICE void load_b_n_inner(u32 (&b)[4], u32 tile, u32 column, u32 k) {
  const u32 lane = threadIdx.x & 31;
  load_matrix_x4_transposed(b, tile + swizzled<ROW_BYTES>(16 * k + (lane & 15), column / 8 + (lane >> 4)));
}
// Words where the tile's rows are k: element (k + lane % 4 + 4 i, position + lane / 4 + 8 j) for the four pairs i, j.
// I_FIRST: r[0], r[1] differ in i (operand B), else in j (operand A).
template <int ROW_BYTES, bool I_FIRST> DEVICE void load_words(u32 (&r)[4], u32 tile, u32 position, u32 k) {
  const u32 lane = threadIdx.x & 31;
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    const u32 i = I_FIRST ? x & 1 : x >> 1, j = I_FIRST ? x >> 1 : x & 1, p = position + lane / 4 + 8 * j;
    r[x] = load_shared_4(tile + swizzled_words<ROW_BYTES>(8 * k + (lane & 3) + 4 * i, p / 4) + 4 * (p & 3));
  }
}

// How operands of element type T meet the matrix instruction:
//   Element, PER_CHUNK      what lies in memory, and how many in 16 bytes
//   K                       how much of k one step takes
//   Fragment                a step's operand in registers: 16 rows of A, or 16 columns of B
//   load_a, load_b          a fragment from a tile; K_INNER: k runs along the tile's rows
//   multiply(d, a, b)       d (16 rows, fp32, 8-column blocks of four) += a · b for N fragments of b side by side
//   swizzled                where a chunk lies in a tile
// fp32 is rounded to tf32, or split in two such numbers: the second operand where REFINED, both where EXACT.
template <class T, bool EXACT = false, bool REFINED = EXACT> struct MmaOperand;

// The accumulators of one 16×8 block.
template <int N> DEVICE float (&block_of(float (&d)[N], int j))[4] { return *reinterpret_cast<float(*)[4]>(&d[4 * j]); }

template <class T> struct MmaHalves {
  using Element = T;
  static constexpr int PER_CHUNK = 8, K = 16;
  struct Fragment { u32 word[4]; };

  template <bool K_INNER, int ROW_BYTES> DEVICE static u32 swizzled(u32 row, u32 chunk) { return ::swizzled<ROW_BYTES>(row, chunk); }
  template <bool K_INNER, int ROW_BYTES> DEVICE static void load_a(Fragment& a, u32 tile, u32 row, u32 k) {
    if constexpr (K_INNER) ::load_a<ROW_BYTES>(a.word, tile, row, k);
    else load_a_m_inner<ROW_BYTES>(a.word, tile, row, k);
  }
  template <bool K_INNER, int ROW_BYTES> DEVICE static void load_b(Fragment& b, u32 tile, u32 column, u32 k) {
    if constexpr (K_INNER) load_b_k_inner<ROW_BYTES>(b.word, tile, column, k);
    else load_b_n_inner<ROW_BYTES>(b.word, tile, column, k);
  }
  template <int N> DEVICE static void multiply(float (&d)[8 * N], const Fragment& a, const Fragment (&b)[N]) {
#pragma unroll
    for (int j = 0; j < 2 * N; ++j) {
      const u32 b0 = b[j / 2].word[2 * (j & 1)], b1 = b[j / 2].word[2 * (j & 1) + 1];
      if constexpr (same<T, half>::value) mma_f16_16816(block_of(d, j), a.word, b0, b1);
      else mma_bf16_16816(block_of(d, j), a.word, b0, b1);
    }
  }
};
template <> struct MmaOperand<half> : MmaHalves<half> {};
template <> struct MmaOperand<bfloat16> : MmaHalves<bfloat16> {};

// e4m3 and i8, k innermost: halves hold their numbers exactly, and a fragment's words hold four of them where those of halves hold two.
// So a fragment becomes two: the first and the last two bytes of every word, which is another order of k, the same in both operands.
template <class T> struct MmaBytes {
  using Element = T;
  static constexpr int PER_CHUNK = 16, K = 32;
  struct Fragment { u32 word[4]; };

  template <bool K_INNER, int ROW_BYTES> DEVICE static u32 swizzled(u32 row, u32 chunk) { return ::swizzled<ROW_BYTES>(row, chunk); }
  template <bool K_INNER, int ROW_BYTES> DEVICE static void load_a(Fragment& a, u32 tile, u32 row, u32 k) {
    static_assert(K_INNER, "");
    ::load_a<ROW_BYTES>(a.word, tile, row, k);
  }
  template <bool K_INNER, int ROW_BYTES> DEVICE static void load_b(Fragment& b, u32 tile, u32 column, u32 k) {
    static_assert(K_INNER, "");
    load_b_k_inner<ROW_BYTES>(b.word, tile, column, k);
  }
  DEVICE static void halves(u32 (&half)[4], const Fragment& f, int pair) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u16 two = static_cast<u16>(f.word[i] >> 16 * pair);
      if constexpr (same<T, e4m3>::value) half[i] = halves_of_e4m3x2(two);
      else half[i] = halves_of_i8x2(two);
    }
  }
  template <int N> DEVICE static void multiply(float (&d)[8 * N], const Fragment& a, const Fragment (&b)[N]) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      u32 rows[4];
      halves(rows, a, pair);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        u32 columns[4];
        halves(columns, b[j], pair);
        mma_f16_16816(block_of(d, 2 * j), rows, columns[0], columns[1]);
        mma_f16_16816(block_of(d, 2 * j + 1), rows, columns[2], columns[3]);
      }
    }
  }
};
template <> struct MmaOperand<e4m3> : MmaBytes<e4m3> {};
template <> struct MmaOperand<i8> : MmaBytes<i8> {};

// fp32 operands on the tf32 instruction: rounded to its 11 bits, or split as big + small, which keep 22 of the 24. Of the four
// products the one of the small parts is below the rounding of the others and left out.
template <bool EXACT, bool REFINED> struct MmaOperand<float, EXACT, REFINED> {
  using Element = float;
  static constexpr int PER_CHUNK = 4, K = 8;
  static_assert(REFINED || !EXACT, "");
  struct Fragment { u32 word[4], small[REFINED ? 4 : 1]; };

  template <bool K_INNER, int ROW_BYTES> DEVICE static u32 swizzled(u32 row, u32 chunk) {
    if constexpr (K_INNER) return ::swizzled<ROW_BYTES>(row, chunk);
    else return swizzled_words<ROW_BYTES>(row, chunk);
  }
  template <bool K_INNER, int ROW_BYTES> DEVICE static void load_a(Fragment& a, u32 tile, u32 row, u32 k) {
    if constexpr (K_INNER) ::load_a<ROW_BYTES>(a.word, tile, row, k);
    else load_words<ROW_BYTES, false>(a.word, tile, row, k);
    round<EXACT>(a);
  }
  template <bool K_INNER, int ROW_BYTES> DEVICE static void load_b(Fragment& b, u32 tile, u32 column, u32 k) {
    if constexpr (K_INNER) load_b_k_inner<ROW_BYTES>(b.word, tile, column, k);
    else load_words<ROW_BYTES, true>(b.word, tile, column, k);
    round<REFINED>(b);
  }
  // From fp32 numbers, as they were loaded, to what the instruction takes.
  template <bool SPLIT = EXACT> DEVICE static void round(Fragment& f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = __uint_as_float(f.word[i]);
      f.word[i] = round_to_tf32(x);
      if constexpr (SPLIT) f.small[i] = round_to_tf32(x - __uint_as_float(f.word[i]));
    }
  }
  template <int N> DEVICE static void multiply(float (&d)[8 * N], const Fragment& a, const Fragment (&b)[N]) {
    if constexpr (!EXACT) {
      accumulate(d, a, b);
    } else {
      // NOTES: the instruction truncates when it adds to its accumulator, which would bias a long sum; so every step starts
      // from zero, and the sum over steps is made of ordinary, rounded additions (Ootomo & Yokota 2022).
      float step[8 * N] = {};
      accumulate(step, a, b);
#pragma unroll
      for (int i = 0; i < 8 * N; ++i) d[i] += step[i];
    }
  }
  // The same, all of it added by the instruction: for short sums.
  template <int N> DEVICE static void accumulate(float (&d)[8 * N], const Fragment& a, const Fragment (&b)[N]) {
    if constexpr (EXACT) add_products(d, a.small, b, [](const Fragment& f) -> const u32(&)[4] { return f.word; });
    if constexpr (REFINED) add_products(d, a.word, b, [](const Fragment& f) -> const u32(&)[4] { return f.small; });
    add_products(d, a.word, b, [](const Fragment& f) -> const u32(&)[4] { return f.word; });
  }

 private:
  template <int N, class PART>
  DEVICE static void add_products(float (&d)[8 * N], const u32 (&a)[4], const Fragment (&b)[N], PART part) {
#pragma unroll
    for (int j = 0; j < 2 * N; ++j) mma_tf32_1688(block_of(d, j), a, part(b[j / 2])[2 * (j & 1)], part(b[j / 2])[2 * (j & 1) + 1]);
  }
};

// One 16-byte chunk of a tile, whose first `count` elements (as many as there are, if more) lie at `source`; the others become zero.
// ACCESS: the bytes that are read at once (16, 4, or an element), at multiples of so many; what then stands behind the last element
// must be zeros or belong to rows that are not stored. Follow with copy_async_commit: all but single elements travel asynchronously.
template <class OPERAND, int ACCESS> DEVICE void copy_chunk(u32 destination, const typename OPERAND::Element* source, u32 count) {
  if constexpr (ACCESS == 16) {
    copy_async_16(destination, source, count != 0);
  } else if constexpr (ACCESS == 4) {
    constexpr int PER_WORD = OPERAND::PER_CHUNK / 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) copy_async_4(destination + 4 * i, source + i * PER_WORD, i * PER_WORD < count);
  } else if constexpr (sizeof(typename OPERAND::Element) == 1) {
    u32 packed[4] = {};
#pragma unroll
    for (int i = 0; i < 16; ++i) packed[i / 4] |= i < count ? static_cast<u32>(reinterpret_cast<const u8*>(source)[i]) << 8 * (i % 4) : 0;
    store_shared_16(destination, make_uint4(packed[0], packed[1], packed[2], packed[3]));
  } else {
    u32 packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 low = 2 * i < count ? source[2 * i].bits : 0, high = 2 * i + 1 < count ? source[2 * i + 1].bits : 0;
      packed[i] = low | high << 16;
    }
    store_shared_16(destination, make_uint4(packed[0], packed[1], packed[2], packed[3]));
  }
}

// Copies ROWS rows of ROW_BYTES, `stride` elements apart in memory, into a tile by THREADS threads; what lies outside rows ×
// columns becomes zero. K_INNER: the columns are k. ACCESS: as in `copy_chunk`.
template <class OPERAND, int THREADS, int ROWS, int ROW_BYTES, bool K_INNER, int ACCESS>
DEVICE void copy_tile(u32 tile, const typename OPERAND::Element* source, i64 stride, u32 row0, u32 rows, u32 column0, u32 columns) {
  constexpr int CHUNKS = ROW_BYTES / 16, ROWS_PER_PASS = THREADS / CHUNKS;
  static_assert(THREADS % CHUNKS == 0, "every thread stays in its column of chunks");
  const u32 chunk = threadIdx.x % CHUNKS, column = column0 + OPERAND::PER_CHUNK * chunk;
#pragma unroll
  for (int pass = 0; pass < (ROWS + ROWS_PER_PASS - 1) / ROWS_PER_PASS; ++pass) {
    const u32 local = pass * ROWS_PER_PASS + threadIdx.x / CHUNKS, row = row0 + local;
    if (ROWS % ROWS_PER_PASS != 0 && local >= ROWS) break;
    const u32 destination = tile + OPERAND::template swizzled<K_INNER, ROW_BYTES>(local, chunk);
    copy_chunk<OPERAND, ACCESS>(destination, source + row * stride + column, row < rows && column < columns ? columns - column : 0);
  }
}

// One stage of a block's product: this warp's WARP_M × WARP_N accumulators += A[row …, TILE_K] · B[TILE_K, column …].
template <class OPERAND, int WARP_M, int WARP_N, int TILE_K, bool A_K_INNER, int A_ROW_BYTES, bool B_K_INNER, int B_ROW_BYTES>
DEVICE void multiply_stage(float (&d)[WARP_M / 16][WARP_N / 2], u32 a_tile, u32 b_tile, u32 row, u32 column) {
#pragma unroll
  for (int k = 0; k < TILE_K / OPERAND::K; ++k) {
    typename OPERAND::Fragment a[WARP_M / 16], b[WARP_N / 16];
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i) OPERAND::template load_a<A_K_INNER, A_ROW_BYTES>(a[i], a_tile, row + 16 * i, k);
#pragma unroll
    for (int j = 0; j < WARP_N / 16; ++j) OPERAND::template load_b<B_K_INNER, B_ROW_BYTES>(b[j], b_tile, column + 16 * j, k);
#pragma unroll
    for (int i = 0; i < WARP_M / 16; ++i) OPERAND::multiply(d[i], a[i], b);
  }
}
