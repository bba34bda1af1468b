// Matrix product of up to 16 rows, which is bound by memory: a[m, k] · b[n, k]ᵀ of fp16 or bf16, fp32 accumulation. What it costs is the
// reading of b, so everything here keeps loads of b under way: a constant b is asked for before the kernel before this one has ended.
// A block has COLUMNS columns; its warps, and `splits` such blocks, divide k in turns of a line of the cache (STEP) and meet only to add
// up what they have: blocks of a cluster (mma/cluster_sums.cuh), neighbours along the grid's x, in shared memory, and those along its y in
// global memory (scheduler/split_k.cuh). b is the matrix instruction's first operand (16 columns), a its second (8 rows, or twice 8). The sum runs over k in
// an order of its own, so that a lane's part of a fragment is 16 neighbouring bytes: of b they wait in shared memory, in places that only
// this lane reads and writes (registers would hold a third of that), without a barrier; of a in registers.
// The kernels around it are gemm_rows.cuh and, for clusters, gemm_rows_joined.cuh.
// config: operand; columns, warps, stages; ahead, the steps for which a is loaded; row_tiles, of 8 rows; cluster; split; constant_b; short_end,
// whether the last two lines of a row are such ones; early, whether registers hold what the epilogue reads.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "mma/cluster_sums.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "scheduler/split_k.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int COLUMNS = config::columns, WARPS = config::warps, THREADS = 32 * WARPS, STAGES = config::stages, AHEAD = config::ahead;
constexpr bool SPLIT = config::split;  // several blocks, or clusters, along the grid's y share the k of some columns
constexpr int CLUSTER = config::cluster;
constexpr int ROW_TILES = config::row_tiles, ROWS = 8 * ROW_TILES;
constexpr int STEP = 64, CHUNK = 8, CHUNKS = STEP / (4 * CHUNK);  // of k: a warp's, a lane's 16 bytes, and a lane's of a row in a step
constexpr int GROUPS = COLUMNS / 16;                             // fragments of 16 columns
constexpr u32 SLOT_BYTES = 32 * 16, STAGE_BYTES = COLUMNS / 8 * CHUNKS * SLOT_BYTES, RING_BYTES = STAGES * STAGE_BYTES;  // of a warp
constexpr int FINISHERS = (ROWS * COLUMNS / 8 + 31) / 32;  // warps that have results
constexpr int OCTETS = COLUMNS / 8, ROW = COLUMNS + 4;  // of partial sums: rows that are so far apart lie in different banks
static_assert(COLUMNS % 16 == 0 && STAGES % AHEAD == 0, "");
static_assert(ROWS * OCTETS <= THREADS, "a thread finishes eight columns of a row");
static_assert(ROWS * ROW * 4 <= RING_BYTES, "partial sums take the place of a warp's ring");
using Joined = ClusterSums<CLUSTER, ROWS * OCTETS>;
static_assert(WARPS * RING_BYTES + Joined::BYTES == config::shared_bytes, "the host asks for the shared memory that is needed");
static_assert(WIDTH == 8, "a thread finishes eight columns");

DEVICE void multiply(float (&d)[4], const u32 (&columns)[4], u32 row0, u32 row1) {
  if constexpr (same<Element, half>::value) mma_f16_16816(d, columns, row0, row1);
  else mma_bf16_16816(d, columns, row0, row1);
}

// A lane's 16 bytes of a row of each tile of rows, for every chunk of a step; zeros beyond the rows and beyond k.
struct Activations { uint4 chunk[ROW_TILES][CHUNKS]; };

DEVICE void load_activations(Activations& a, const Params& p, u32 k) {
  const u32 lane = threadIdx.x & 31;
#pragma unroll
  for (int tile = 0; tile < ROW_TILES; ++tile) {
    const u32 row = 8 * tile + lane / 4;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const u32 first = k + 4 * CHUNK * i;
      a.chunk[tile][i] = make_uint4(0, 0, 0, 0);
      if (row < p.m && first < p.k) a.chunk[tile][i] = *reinterpret_cast<const uint4*>(p.a + row * p.a_stride + first);
    }
  }
}

// A lane's 16 bytes of every eighth column, for every chunk of a step; zeros beyond the columns and beyond k. The cache is asked for two
// lines ahead, but not where a row has three quarters of them or less.
DEVICE void copy_weights(u32 stage, const Params& p, u32 column, u32 k) {
#pragma unroll
  for (int octet = 0; octet < OCTETS; ++octet)
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const u32 c = column + 8 * octet, first = k + 4 * CHUNK * i;
      const bool valid = c < p.n && first < p.k;
      const u32 slot = stage + (octet * CHUNKS + i) * SLOT_BYTES;
      const Element* from = p.b + (valid ? c * p.b_stride + first : 0);
      if (config::short_end && (k & ~(2u * STEP - 1)) + 3 * STEP / 2 >= p.k) copy_async_16(slot, from, valid);
      else copy_async_16_ahead(slot, from, valid);
    }
}

DEVICE void multiply_step(float (&d)[GROUPS][ROW_TILES][4], u32 stage, const Activations& a) {
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
      const uint4 left = load_shared_16(stage + (2 * group * CHUNKS + i) * SLOT_BYTES);
      const uint4 right = load_shared_16(stage + ((2 * group + 1) * CHUNKS + i) * SLOT_BYTES);
      const u32 first[4] = {left.x, right.x, left.y, right.y}, second[4] = {left.z, right.z, left.w, right.w};
#pragma unroll
      for (int tile = 0; tile < ROW_TILES; ++tile) {
        multiply(d[group][tile], first, a.chunk[tile][i].x, a.chunk[tile][i].y);
        multiply(d[group][tile], second, a.chunk[tile][i].z, a.chunk[tile][i].w);
      }
    }
}

// What of the results a thread finishes: eight columns of a row. Where its inputs are not fetched early, it is worked out only after the
// products, so that it takes no registers meanwhile.
struct Share {
  u32 row, octet, own, count;
  bool finishes;
  DEVICE Share(const Params& p, u32 column0) : row(threadIdx.x / OCTETS), octet(threadIdx.x % OCTETS), own(column0 + 8 * octet) {
    finishes = row < p.m && own < p.n;
    count = finishes ? min(8u, p.n - own) : 0;
  }
};

DEVICE void multiply_rows(const Params& p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31, tile = blockIdx.x / CLUSTER, column0 = tile * COLUMNS;
  const u32 ring = shared_address(shared) + warp * RING_BYTES, slot = ring + 16 * lane;
  const u32 rank = blockIdx.x % CLUSTER, split = blockIdx.y * CLUSTER + rank;
  const u32 turn = splits_of<SPLIT>(p) * CLUSTER * WARPS;  // the lines that all warps take in a step
  const u32 lines = (p.k + STEP - 1) / STEP, first_line = split * WARPS + warp, steps = lines > first_line ? (lines - first_line + turn - 1) / turn : 0;
  const u32 column = column0 + lane / 4;
  const auto k_of = [=](u32 step) { return (step * turn + first_line) * STEP + (lane & 3) * CHUNK; };

  const auto copy_step = [&](u32 step, int stage) {
    if (step < steps) copy_weights(slot + stage * STAGE_BYTES, p, column, k_of(step));
    copy_async_commit();
  };
  let_next_kernel_start();
  if constexpr (!config::constant_b) wait_for_previous_kernel();
#pragma unroll
  for (int i = 0; i < STAGES; ++i) copy_step(i, i);
  const Joined joined{shared_address(shared) + WARPS * RING_BYTES, rank};
  joined.begin();
  if constexpr (config::constant_b) wait_for_previous_kernel();
  stamp_begin(p.stamp);

  Epilogue::Inputs inputs;
  Activations a[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; ++i)
    if (i < steps) load_activations(a[i], p, k_of(i));
  Share mine(p, column0);
  if constexpr (config::early)
    if (mine.finishes) inputs = Epilogue::fetch(p, mine.row, mine.own, mine.count);

  float d[GROUPS][ROW_TILES][4] = {};
  for (u32 first = 0; first < steps; first += STAGES) {
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      const u32 step = first + stage;
      if (step >= steps) break;
      copy_async_wait<STAGES - 1>();
      multiply_step(d, slot + stage * STAGE_BYTES, a[stage % AHEAD]);
      copy_step(step + STAGES, stage);
      if (step + AHEAD < steps) load_activations(a[stage % AHEAD], p, k_of(step + AHEAD));
    }
  }
  if constexpr (!config::early) {
    mine = Share(p, column0);
    if (mine.finishes) inputs = Epilogue::fetch(p, mine.row, mine.own, mine.count);
  }

  __syncwarp();  // the warp's sums take the place of its ring, from which all lanes have read
  float* const sums = reinterpret_cast<float*>(shared + warp * RING_BYTES);
#pragma unroll
  for (int group = 0; group < GROUPS; ++group)
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[(8 * tile + 2 * (lane & 3) + i % 2) * ROW + 16 * group + 8 * (i / 2) + lane / 4] = d[group][tile][i];
  __syncthreads();
  if (warp < FINISHERS) {
    float v[1][8] = {};
#pragma unroll
    for (int w = 0; w < WARPS && mine.row < ROWS; ++w) {
      const float4* const eight = reinterpret_cast<const float4*>(shared + w * RING_BYTES + (mine.row * ROW + mine.octet * 8) * 4);
      const float4 left = eight[0], right = eight[1];
      v[0][0] += left.x, v[0][1] += left.y, v[0][2] += left.z, v[0][3] += left.w;
      v[0][4] += right.x, v[0][5] += right.y, v[0][6] += right.z, v[0][7] += right.w;
    }
    const bool last = joined.add(v[0]) && add_splits<SPLIT>(p, v, tile * FINISHERS + warp, blockIdx.y);
    if (last && mine.finishes) Epilogue::store(p, mine.row, mine.own, mine.count, v[0], inputs);
  }
  stamp_end(p.stamp);
}
