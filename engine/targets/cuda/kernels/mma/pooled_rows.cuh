// Results of the pipeline on wgmma (mma/wgmma_pipeline.cuh) that are maxima of sums over windows of 2 × 2 pixels: of a tile's rows (see
// mma/pooled_load.cuh) a consumer has 64 of the upper half and the 64 below them, so that a window is two neighbouring rows of either
// part. Four lanes apart lie neighbouring rows: such a pair of lanes changes half of its columns' maxima, and then each has one result row.
#pragma once
#include "mma/wgmma_pipeline.cuh"

static_assert(PARTS == 2 && !SPLIT && CLUSTER_K == 1, "");

// The maxima of a lane: of block j of eight columns two neighbouring ones, of the window's row that PooledRows says.
template <int N> DEVICE void window_maxima(const float (&d)[2][N], float (&maxima)[N / 2]) {
  const bool odd = threadIdx.x & 4;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const int first = i / 2 * 4 + i % 2;
    const float low = max_nan(d[0][first], d[1][first]), high = max_nan(d[0][first + 2], d[1][first + 2]);
    maxima[i] = max_nan(odd ? high : low, __shfl_xor_sync(~0u, odd ? low : high, 4));
  }
}

// What a lane has of these: a layout for epilogue/early.cuh.
template <int BLOCKS> struct PooledRows {
  static_assert(BLOCKS % 4 == 0, "four lanes hold the columns of four blocks");
  static constexpr int TOTAL = BLOCKS / 4, CHUNK = 1, FIXED = TOTAL, TOGETHER = TOTAL <= 8 ? TOTAL : 2;
  static constexpr bool BLOCKS_OF_ROWS = true;
  u32 first, columns, pixel, pixels;
  // Of a lane whose first row of the sums is `layout`'s.
  DEVICE explicit PooledRows(const Layout& layout) : first(layout.first), columns(layout.columns), pixels(layout.rows / 4) {
    // Its warp has 16 neighbours of the upper half, from a multiple of 16 on: eight windows.
    const u32 tile = layout.first_row / TILE_M, within = layout.first_row - tile * TILE_M, octet = threadIdx.x / 4 & 7;
    pixel = tile * (TILE_M / 4) + (within - octet) / 2 + (octet & 1) * 4 + octet / 2;
  }
  DEVICE PooledRows again() const {
    PooledRows same = *this;
    same.pixel = unknown(pixel);
    return same;
  }
  DEVICE static constexpr int fixed_of(int piece) { return piece; }
  DEVICE u32 column(int group) const { return first + 32 * group + 8 * (threadIdx.x & 3); }
  DEVICE bool row(const Params&, int, u32& found) const {
    found = pixel;
    return pixel < pixels;
  }
  DEVICE void gather(const float (&maxima)[2 * BLOCKS], int piece, float (&v)[1][8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[0][i] = maxima[8 * piece + i];
    transpose_quad(v[0], threadIdx.x & 3);
  }
  template <class T> DEVICE static uint4 rounded(const float (&maxima)[2 * BLOCKS], int piece) {
    u32 v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = pack_pair<T>(maxima[8 * piece + 2 * j], maxima[8 * piece + 2 * j + 1]);
    transpose_words(v, threadIdx.x & 3);
    return make_uint4(v[0], v[1], v[2], v[3]);
  }
};

// Consumers store the maxima themselves.
struct PooledStores {
  static constexpr bool STAGED = false, BRINGS = false;
  static constexpr int PART_ROWS = TILE_M / 2, SHARED_BYTES = RING_BYTES;
  using Rows = PooledRows<TILE_N / 8>;
  struct Results {
    EarlyEpilogue<Epilogue, Rows, CONSUMER_REGISTERS - RESERVED - ACCUMULATORS> epilogue;
    DEVICE void begin_columns(const Params& p, const Layout& layout) { epilogue.begin_columns(p, Rows(layout)); }
    DEVICE void begin(const Params& p, const Layout& layout) { epilogue.begin(p, Rows(layout)); }
    DEVICE void store(const Params& p, const Layout& layout, const float (&d)[PARTS][TILE_N / 2]) {
      float maxima[TILE_N / 4];
      window_maxima(d, maxima);
      epilogue.store(p, Rows(layout), maxima);
    }
  };
};
