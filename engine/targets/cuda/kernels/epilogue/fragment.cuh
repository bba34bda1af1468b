// From the accumulator layout of the matrix instructions (mma.sync and wgmma share it) to rows of eight neighbouring
// columns, which is what an epilogue reads and writes with 16-byte accesses. No shared memory, safe on ragged edges.
#pragma once
#include "ptx/memory.cuh"
#include "ptx/pack.cuh"
#include "types.cuh"

// A 4×4 transpose of pairs within four neighbouring lanes: v[2j], v[2j+1] are this lane's two columns of 8-column block j;
// after it they are lane j's two columns of block `quad` — so the eight values are the columns of one block, in order.
DEVICE void transpose_quad(float (&v)[8], int quad) {
  const bool odd = quad & 1;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float x = __shfl_xor_sync(~0u, odd ? v[0 + i] : v[2 + i], 1);
    const float y = __shfl_xor_sync(~0u, odd ? v[4 + i] : v[6 + i], 1);
    if (odd) { v[0 + i] = x; v[4 + i] = y; } else { v[2 + i] = x; v[6 + i] = y; }
  }
  const bool upper = quad & 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float x = __shfl_xor_sync(~0u, upper ? v[0 + i] : v[4 + i], 2);
    const float y = __shfl_xor_sync(~0u, upper ? v[2 + i] : v[6 + i], 2);
    if (upper) { v[0 + i] = x; v[2 + i] = y; } else { v[4 + i] = x; v[6 + i] = y; }
  }
}

// Four words of each of four neighbouring lanes: v[j] becomes what lane j had for this one.
DEVICE void transpose_words(u32 (&v)[4], u32 quad) {
  const bool odd = quad & 1, upper = quad & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 x = __shfl_xor_sync(~0u, odd ? v[i] : v[i + 1], 1);
    if (odd) v[i] = x; else v[i + 1] = x;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 x = __shfl_xor_sync(~0u, upper ? v[i] : v[i + 2], 2);
    if (upper) v[i] = x; else v[i + 2] = x;
  }
}

// As `transpose_quad`, for accumulators whose rows are columns of the result: v[8h + j] is column `octet` + 8h of 16, of row j of 8, in the eight
// lanes that differ in `octet` (bits 2 to 4 of the lane). After it v[8k + c] is column c + 8 · (octet & 1) of row 4k + octet / 2: two
// lanes hold 16 columns of a row, a whole sector of memory.
DEVICE void transpose_octet(float (&v)[16], int octet) {
  constexpr int INDEX_BIT[3] = {8, 1, 2};  // changes places with this bit of the lane
#pragma unroll
  for (int bit = 0; bit < 3; ++bit) {
    const bool upper = octet >> bit & 1;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int other = i | INDEX_BIT[bit];
      if (other == i) continue;
      const float x = __shfl_xor_sync(~0u, upper ? v[i] : v[other], 4 << bit);
      if (upper) v[i] = x; else v[other] = x;
    }
  }
  float w[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) w[i] = v[(i & 1) << 3 | i >> 3 << 2 | (i >> 2 & 1) << 1 | (i >> 1 & 1)];
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = w[i];
}

// How the 32 columns of four blocks lie in the accumulators of four neighbouring lanes.
enum class Arrangement {
  BLOCKS,   // block after block, as the instruction has them
  STRIDE_4  // column c of block b is column 4c + b: a lane holds eight neighbouring ones (attention_tiles.cuh)
};

// A fragment of 16 rows and BLOCKS 8-column blocks goes to the epilogue in pieces, a row of four blocks each: piece i is this lane's
// row i % 2 of blocks 4 (i / 2) on. `rows` are the lane's rows of the iteration space, `stored` whether they are there; columns start
// at `column` of `columns`.

// Where the epilogue finds and puts what belongs to a lane's two rows. A row may be split by division into batch, head and position: that is
// done once, not for each piece. Of a row that is not there the first one is looked up.
template <class EPILOGUE> struct Places {
  typename EPILOGUE::Rows sources[2];
  typename EPILOGUE::Targets targets[2];
  DEVICE Places(const Params& p, const u32 (&rows)[2], const bool (&stored)[2])
      : sources{EPILOGUE::at(p, stored[0] ? rows[0] : 0), EPILOGUE::at(p, stored[1] ? rows[1] : 0)},
        targets{EPILOGUE::to(p, rows[0]), EPILOGUE::to(p, rows[1])} {}
};

// Fetches what the epilogue reads for COUNT pieces from `first` on.
template <class EPILOGUE, int COUNT>
DEVICE void fetch_pieces(const Params& p, typename EPILOGUE::Inputs (&inputs)[COUNT], int first, const Places<EPILOGUE>& places, u32 column,
                         u32 columns) {
  const int quad = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const u32 c = column_there(column + 32 * ((first + i) / 2) + 8 * quad, columns);
    inputs[i] = EPILOGUE::fetch(p, places.sources[(first + i) % 2], c, min(8u, columns - c));
  }
}

// Piece number `piece` of a fragment: eight neighbouring columns of a row.
template <Arrangement ARRANGEMENT, int SIZE> DEVICE void piece_of(float (&v)[8], const float (&d)[SIZE], int piece) {
  const int group = piece / 2, lower = piece % 2;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int element = (4 * group + j) * 4 + 2 * lower;
    v[ARRANGEMENT == Arrangement::BLOCKS ? 2 * j : j] = d[element];
    v[ARRANGEMENT == Arrangement::BLOCKS ? 2 * j + 1 : j + 4] = d[element + 1];
  }
  if constexpr (ARRANGEMENT == Arrangement::BLOCKS) transpose_quad(v, threadIdx.x & 3);
}
// The same rounded to 16 bits: half as many words pass from lane to lane.
template <class T, int SIZE> DEVICE uint4 rounded_piece(const float (&d)[SIZE], int piece) {
  const int group = piece / 2, lower = piece % 2;
  u32 v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int element = (4 * group + j) * 4 + 2 * lower;
    v[j] = pack_pair<T>(d[element], d[element + 1]);
  }
  transpose_words(v, threadIdx.x & 3);
  return make_uint4(v[0], v[1], v[2], v[3]);
}

// Stores the results of pieces whose `inputs` have been fetched, `v[0]` those of the first.
template <class EPILOGUE, int COUNT>
DEVICE void store_pieces(const Params& p, const float (*v)[8], const typename EPILOGUE::Inputs (&inputs)[COUNT], int first,
                         const Places<EPILOGUE>& places, const bool (&stored)[2], u32 column, u32 columns) {
  const int quad = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int lower = (first + i) % 2;
    const u32 c = column + 32 * ((first + i) / 2) + 8 * quad;
    EPILOGUE::store(p, places.targets[lower], c, stored[lower] && c < columns ? min(8u, columns - c) : 0, v[i], inputs[i]);
  }
}

// Hands a whole fragment to the epilogue. What it reads is fetched for AHEAD pieces at a time: as many as the kernel has registers for.
// Results of 16 bits whose rows are not aligned (EPILOGUE::SHIFTED) pass from lane to lane.
template <class EPILOGUE, int BLOCKS, int AHEAD = BLOCKS / 2, Arrangement ARRANGEMENT = Arrangement::BLOCKS>
DEVICE void emit_rows(const Params& p, const float (&d)[BLOCKS * 4], const u32 (&rows)[2], const bool (&stored)[2], u32 column, u32 columns) {
  static_assert(BLOCKS % 4 == 0, "four lanes hold the columns of four blocks");
  constexpr int PIECES = BLOCKS / 2;
  static_assert(PIECES % AHEAD == 0, "");
  const Places<EPILOGUE> places(p, rows, stored);
  if constexpr (EPILOGUE::SHIFTED) {  // a row after the other: each carries registers along
    constexpr int GROUPS = BLOCKS / 4, GROUPS_AHEAD = AHEAD == PIECES ? GROUPS : 1;
    const u32 own = column + 8 * (threadIdx.x & 3), end = min(columns, column + 8 * BLOCKS);
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const bool present = stored[lower];
      typename EPILOGUE::Carries carries = {};
#pragma unroll
      for (int first = 0; first < GROUPS; first += GROUPS_AHEAD) {
        typename EPILOGUE::Inputs inputs[GROUPS_AHEAD];
#pragma unroll
        for (int i = 0; i < GROUPS_AHEAD; ++i) {
          const u32 c = own + 32 * (first + i);
          if (present && c < end) inputs[i] = EPILOGUE::fetch(p, places.sources[lower], c, min(8u, end - c));
        }
#pragma unroll
        for (int i = 0; i < GROUPS_AHEAD; ++i) {
          float v[8];
          piece_of<ARRANGEMENT>(v, d, 2 * (first + i) + lower);
          const Along at = first + i == 0 ? Along::FIRST : Along::WITHIN;
          EPILOGUE::store_shifted(p, rows[lower], own + 32 * (first + i), column, end, present, at, v, inputs[i], carries);
        }
      }
      EPILOGUE::template store_rest<8>(p, rows[lower], own + 8 * BLOCKS, column, end, present, carries);
    }
  } else if constexpr (EPILOGUE::ROUNDS && ARRANGEMENT == Arrangement::BLOCKS) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i) {
      const u32 c = column + 32 * (i / 2) + 8 * (threadIdx.x & 3);
      store_global_16_if(stored[i % 2] && c < columns, EPILOGUE::place(p, places.targets[i % 2], c), rounded_piece<typename EPILOGUE::Rounded>(d, i));
    }
  } else {
    // Up to 16 blocks are rearranged before the first piece is stored: lanes wait for each other once.
    constexpr int TOGETHER = BLOCKS <= 16 ? PIECES : AHEAD;
#pragma unroll
    for (int begin = 0; begin < PIECES; begin += TOGETHER) {
      float v[TOGETHER][8];
#pragma unroll
      for (int i = 0; i < TOGETHER; ++i) piece_of<ARRANGEMENT>(v[i], d, begin + i);
#pragma unroll
      for (int first = 0; first < TOGETHER; first += AHEAD) {
        typename EPILOGUE::Inputs inputs[AHEAD];
        fetch_pieces<EPILOGUE>(p, inputs, begin + first, places, column, columns);
        store_pieces<EPILOGUE>(p, v + first, inputs, begin + first, places, stored, column, columns);
      }
    }
  }
}

// The same where the rows are neighbours: `row` is this lane's first one (the other is row + 8) of `rows`; `first_row` is added to
// make the row of the iteration space.
template <class EPILOGUE, int BLOCKS, int AHEAD = BLOCKS / 2, Arrangement ARRANGEMENT = Arrangement::BLOCKS>
DEVICE void emit_fragment(const Params& p, const float (&d)[BLOCKS * 4], u32 first_row, u32 row, u32 rows, u32 column, u32 columns) {
  const u32 both[2] = {first_row + row, first_row + row + 8};
  const bool stored[2] = {row < rows, row + 8 < rows};
  emit_rows<EPILOGUE, BLOCKS, AHEAD, ARRANGEMENT>(p, d, both, stored, column, columns);
}
