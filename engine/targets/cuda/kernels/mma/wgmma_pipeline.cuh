// The pipeline of products on wgmma for sm_90a: a[m, k] · b[n, k]ᵀ, operands of fp16, bf16, e4m3, i8 or tf32 (fp32 that the
// copy engine rounds), fp32 accumulation (of e4m3: see gemm_wgmma.py; of i8: in integers, which then become fp32). The kernels on it (gemm_wgmma.cuh, conv_wgmma.cuh) differ in how a tile of `a` reaches shared memory.
// Persistent and warp-specialised: one thread keeps a ring of STAGES tiles filled through TMA for two or three consumer warpgroups.
// Two take output tiles in turn (ping-pong), so that one multiplies while the other runs its epilogue; or, COOPERATIVE, all of them
// have as many rows of every tile, which is faster where a block has a single tile, and allows wider and taller ones.
// The grid is blocks × splits × groups: the blocks along y share the k of a tile; each group has its own columns of b and of the result.
// Blocks may form clusters of two that share an operand's tile (mma/cluster.cuh), or clusters that share the k of a single tile, or both.
#pragma once
#include "epilogue/early.cuh"
#include "mma/cluster.cuh"
#include "ptx/barrier.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "ptx/tma.cuh"
#include "scheduler/joined_k.cuh"
#include "scheduler/split_k.cuh"
#include "scheduler/stamp.cuh"
#include "scheduler/tiles.cuh"

using Element = config::operand;
constexpr int TILE_M = config::tile_m, TILE_N = config::tile_n, TILE_K = 128 / sizeof(Element), STAGES = config::stages;
constexpr bool COOPERATIVE = config::cooperative, SPLIT = config::split, GROUPED = config::grouped;
constexpr int CONSUMERS = config::consumers, CONSUMER_M = COOPERATIVE ? TILE_M / CONSUMERS : TILE_M;
constexpr int PARTS = CONSUMER_M / 64;  // one instruction covers 64 rows
constexpr int THREADS = 128 * (1 + CONSUMERS), ACCUMULATORS = PARTS * TILE_N / 2;
using Sum = typename choose<same<Element, i8>::value, i32, float>::type;
using Layout = NeighbouringRows<PARTS, TILE_N / 8>;
constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 40 : 56, CONSUMER_REGISTERS = CONSUMERS == 2 ? 232 : 152;
constexpr int RESERVED = 72;  // registers of a consumer for anything but accumulators and operands of the epilogue
// A block starts with 168 registers for each of 384 threads, 128 for each of 512. Asking for more than these in all waits for ever, and
// an instruction's accumulators have to fit them: three consumers have tiles of up to 192 columns.
static_assert(128 * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) <= 65536 / THREADS / 8 * 8 * THREADS, "");
static_assert(CONSUMERS == 2 || COOPERATIVE, "turns are handed from one to the other");
static_assert(CONSUMER_M % 64 == 0 && PARTS * 64 * (COOPERATIVE ? CONSUMERS : 1) == TILE_M, "consumers have whole instructions");

// The k of a stage is 128 bytes. Those of a lie in panels of TILE_M rows of PANEL_BYTES, one copy each; those of b in one.
constexpr int PANEL_BYTES = config::panel_bytes, PANELS = 128 / PANEL_BYTES, PANEL = TILE_M * PANEL_BYTES;
constexpr int PANEL_STEPS = PANEL_BYTES / 32;  // an instruction takes 32 bytes of k
constexpr int A_BYTES = TILE_M * 128, B_BYTES = TILE_N * 128, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int BARRIERS = STAGES * STAGE_BYTES;  // full[STAGES], empty[STAGES], turn[CONSUMERS]
constexpr int RING_BYTES = BARRIERS + 8 * (2 * STAGES + CONSUMERS);
// Of clusters that share k: a barrier, and what they send each other.
using Joined = JoinedSums<Epilogue, CLUSTER_K, CLUSTER, PARTS, TILE_N, COOPERATIVE ? 128 * CONSUMERS : 128>;
constexpr int LANDED = RING_BYTES, JOINED_SUMS = (LANDED + 8 + 15) / 16 * 16;
static_assert(A_BYTES % 1024 == 0 && B_BYTES % 1024 == 0, "operands start at a swizzle atom");
static_assert(CLUSTER == 1 || (!SPLIT && !GROUPED), "");
static_assert(CLUSTER_K == 1 || !SPLIT, "");

// BATCHED loads are of products of several matrices, one after the other: see mma/batch_load.cuh.
template <bool BATCHED, class P> DEVICE u32 matrices_of(const P& p) {
  if constexpr (BATCHED) return p.matrices;
  else return 1;
}
template <class LOAD> DEVICE u64 second_descriptor(u32 address) {
  if constexpr (LOAD::BATCHED) return LOAD::descriptor(address);
  else return operand_descriptor<128>(address);
}

// The accumulators as fp32: themselves, or their values in registers of which the compiler makes the same ones.
struct None {};
template <int N> DEVICE float (&as_floats(float (&d)[PARTS][N], None&))[PARTS][N] { return d; }
template <int N> DEVICE float (&as_floats(i32 (&d)[PARTS][N], float (&values)[PARTS][N]))[PARTS][N] {
#pragma unroll
  for (int i = 0; i < PARTS; ++i)
#pragma unroll
    for (int j = 0; j < N; ++j) values[i][j] = static_cast<float>(d[i][j]);
  return values;
}

// Consumers store their results themselves: they keep what the epilogue reads in registers.
struct OwnStores {
  static constexpr bool STAGED = false, BRINGS = false;
  static constexpr int PART_ROWS = 64;  // of the tile, from a consumer's part to its next
  static constexpr int SHARED_BYTES = CLUSTER_K > 1 ? JOINED_SUMS + static_cast<int>(Joined::BYTES) : RING_BYTES;
  using Results = EarlyEpilogue<Epilogue, Layout, CONSUMER_REGISTERS - RESERVED - ACCUMULATORS>;
};

// Rows of the first operand as they are; the other way is mma/divided_rows.cuh.
struct WholeRows {
  static constexpr bool DIVIDES = false;
  DEVICE void begin(const Params&, const Layout&) {}
  DEVICE float quotient(float d, int) const { return d; }
};
template <class DIVISORS> DEVICE void divide(const DIVISORS& divisors, float (&d)[PARTS][TILE_N / 2]) {
#pragma unroll
  for (int i = 0; i < PARTS; ++i)
#pragma unroll
    for (int j = 0; j < TILE_N / 2; ++j) d[i][j] = divisors.quotient(d[i][j], 2 * i + j / 2 % 2);
}

// LOAD(p, row, step) is made for each tile of a, by its first row and first step; its call (p, destination, barrier, step) copies
// the panels of a step of a, whose b begins at column LOAD::column_of_b(step). Steps come one after the other; UNROLL of them fit the
// producer's registers at once. AHEAD rows of 32 columns of epilogue operands fit a consumer's, beside the accumulators, where partial
// sums have been added.
// Of b, LOAD::early(p) steps do not wait for the kernel before to end: those of a constant, as many as the ring holds at most.
// STORES: who stores the results; the other way is mma/staging.cuh. DIVISORS: by what rows of accumulators are divided.
template <class LOAD, class STORES = OwnStores, class DIVISORS = WholeRows> DEVICE void run_pipeline(const Params& p) {
  constexpr int READERS = CLUSTER * (COOPERATIVE ? CONSUMERS : 1);  // that a stage waits for
  static_assert(CLUSTER * CLUSTER_K == 1 || !LOAD::BATCHED, "");
  static_assert(CLUSTER_K == 1 || !STORES::STAGED, "");
  static_assert(STORES::SHARED_BYTES == config::shared_bytes, "the host asks for ring, barriers and staged results");
  extern __shared__ __align__(1024) u8 shared[];
  const u32 ring = shared_address(shared);
  const u32 full = ring + BARRIERS, empty = full + 8 * STAGES, turn = empty + 8 * STAGES;
  const u32 warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(p.map_a);
    prefetch_tensor_map(p.map_b);
    for (int i = 0; i < 2 * STAGES + CONSUMERS; ++i)
      barrier_init(full + 8 * i, i < STAGES ? 1 : i < 2 * STAGES ? READERS : 4);
    if constexpr (CLUSTER_K > 1) {
      barrier_init(ring + LANDED, 1);
      barrier_arrive_expect(ring + LANDED, Joined::expected());
    }
    if constexpr (STORES::STAGED) STORES::init(p, ring);
    barrier_init_fence();
  }
  start_together();
  let_next_kernel_start();

  // Of a cluster, where blocks form clusters.
  constexpr u32 ROWS = CLUSTER_M * TILE_M, COLUMNS = CLUSTER_N * TILE_N;
  const u32 tiles_m = (p.m + ROWS - 1) / ROWS, tiles_n = (p.n + COLUMNS - 1) / COLUMNS, tiles = tiles_m * tiles_n;
  const u32 all = LOAD::BATCHED ? tiles * matrices_of<LOAD::BATCHED>(p) : tiles;
  const u32 group = GROUPED ? blockIdx.z : 0, first_column = group * p.n;
  // The blocks that share tiles take as many steps each; beyond k they read zeros.
  const u32 splits = CLUSTER_K > 1 ? CLUSTER_K : splits_of<SPLIT>(p), steps = ((p.k + TILE_K - 1) / TILE_K + splits - 1) / splits;
  const u32 first_step = (CLUSTER_K > 1 ? rank_of_part() : blockIdx.y) * steps;
  u32 asked = 0;  // steps of the first tile whose b is on its way
  if constexpr (!LOAD::BATCHED) {
    if (threadIdx.x == 0) {
      const TileIndex tile = own_tile(first_turn(), tiles_m, tiles_n);
      for (; asked < min(LOAD::early(p), steps); ++asked) {
        const u32 landed = full + 8 * asked, b = ring + asked * STAGE_BYTES + A_BYTES;
        barrier_arrive_expect(landed, STAGE_BYTES);
        copy_shared_box<TILE_N, CLUSTER_M>(b, p.map_b, landed, LOAD::column_of_b(first_step + asked), first_column + tile.n * TILE_N);
      }
    }
  }
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  if (warpgroup == 0) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) {
      u32 stage = 0, parity = 1;  // a fresh barrier counts as completed in the phase before its first
      for (u32 t = first_turn(); t < all; t += turns()) {
        const u32 matrix = LOAD::BATCHED ? t / tiles : 0;
        const TileIndex tile = own_tile(t - matrix * tiles, tiles_m, tiles_n);
        LOAD load(p, tile.m * TILE_M, first_step);
        if constexpr (LOAD::BATCHED) load.turn_to(p, matrix, tile.n * TILE_N);
        u32 step = first_step;
        // A loop of its own, since the other one has to be short: small tiles wait for it.
        for (; asked > 0; --asked, ++step, ++stage) load(p, ring + stage * STAGE_BYTES, full + 8 * stage, step);
        if (stage == STAGES) { stage = 0; parity ^= 1; }
#pragma unroll LOAD::UNROLL
        for (; step < first_step + steps; ++step) {
          const u32 a = ring + stage * STAGE_BYTES, landed = full + 8 * stage;
          barrier_wait(empty + 8 * stage, parity);
          barrier_arrive_expect(landed, STAGE_BYTES);
          load(p, a, landed, step);
          if constexpr (LOAD::BATCHED) load.second(p, a + A_BYTES, landed, step);
          else copy_shared_box<TILE_N, CLUSTER_M>(a + A_BYTES, p.map_b, landed, LOAD::column_of_b(step), first_column + tile.n * TILE_N);
          if (++stage == STAGES) { stage = 0; parity ^= 1; }
        }
      }
      wait_for_readers<STAGES>(empty, stage, parity);
    }
    if constexpr (STORES::STAGED) {
      const u32 consumer = threadIdx.x / 32 - 1;  // one thread each carries results
      if (consumer < CONSUMERS && threadIdx.x % 32 == 0) STORES(ring, consumer).carry(p, tiles_m, tiles_n);
    }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const u32 consumer = warpgroup - 1, lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3;
    const bool leader = threadIdx.x % 128 == 0;
    const u32 row0 = COOPERATIVE ? consumer * (STORES::PART_ROWS == 64 ? CONSUMER_M : 64) : 0;  // within the tile
    const u64 a0 = operand_descriptor<PANEL_BYTES>(ring + row0 * PANEL_BYTES), b0 = second_descriptor<LOAD>(ring + A_BYTES);
    const EmptyBarriers read(empty);
    constexpr u32 TURNS = COOPERATIVE ? 1 : CONSUMERS;
    u32 ordinal = COOPERATIVE ? 0 : consumer;  // of this block's tiles
    for (u32 t = first_turn() + ordinal * turns(); t < all; t += TURNS * turns(), ordinal += TURNS) {
      u32 stage = ordinal * steps % STAGES, parity = ordinal * steps / STAGES & 1, previous = stage;
      const u32 matrix = LOAD::BATCHED ? t / tiles : 0, first_row = matrix * p.m;
      const TileIndex tile = own_tile(t - matrix * tiles, tiles_m, tiles_n);
      const u32 column = first_column + tile.n * TILE_N, columns = first_column + p.n, row = tile.m * TILE_M + row0 + 16 * warp + lane / 4;
      const Layout layout(column, columns, first_row + row, first_row + p.m);
      typename STORES::Results epilogue;
      DIVISORS divisors;
      if constexpr (!SPLIT && CLUSTER_K == 1) {  // while the other consumer multiplies
        divisors.begin(p, layout);
        epilogue.begin_columns(p, layout);
        epilogue.begin(p, layout);
      }
      Sum sums[PARTS][TILE_N / 2];
      // A barrier's parity says nothing two phases later: wait until the other consumer is through with the stages before.
      if (!COOPERATIVE && ordinal > 0) barrier_wait(turn + 8 * consumer, (ordinal - 1) / CONSUMERS & 1);

      if constexpr (STORES::BRINGS) {
        if (ordinal < TURNS) {  // the first tile
          barrier_wait(full + 8 * stage, parity);
          if (leader) STORES(ring, consumer).begin();
        }
      }
      for (u32 step = 0; step < steps; ++step) {
        barrier_wait(full + 8 * stage, parity);
        const u64 offset = stage * (STAGE_BYTES >> 4);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 128 / 32; ++k) {
          const u64 a_k = k / PANEL_STEPS * (PANEL >> 4) + 2 * (k % PANEL_STEPS);
#pragma unroll
          for (int i = 0; i < PARTS; ++i) {
            const u64 a = a0 + offset + (STORES::PART_ROWS * PANEL_BYTES >> 4) * i + a_k;
            if constexpr (LOAD::BATCHED) LOAD::multiply(sums[i], a, b0 + offset + LOAD::STEP * k, step | k);
            else wgmma<TILE_N, Element>(sums[i], a, b0 + offset + 2 * k, step | k);
          }
        }
        wgmma_commit();
        if (step > 0) {
          wgmma_wait<1>();
          if (leader) read.arrive(previous);
        }
        previous = stage;
        if (++stage == STAGES) { stage = 0; parity ^= 1; }
      }
      // Each warp hands the turn on. Where a tile is a single step the leader comes here before its product has waited for the
      // consumer's other warps: one that is still busy with the tile before would see its own turn two phases late, and wait for ever.
      if (!COOPERATIVE && lane == 0) barrier_arrive(turn + 8 * (consumer ^ 1));
      wgmma_wait<0>();
      if (leader) read.arrive(previous);
#pragma unroll
      for (int i = 0; i < PARTS; ++i) wgmma_settle(sums[i]);
      if constexpr (SPLIT) {
        const u32 every = group * tiles + t, share = COOPERATIVE ? CONSUMERS * every + consumer : every;
        if (!add_splits<SPLIT>(p, sums, 4 * share + warp, blockIdx.y)) continue;
      }
      if constexpr (CLUSTER_K > 1) {  // the cluster's only tile
        const u32 thread = COOPERATIVE ? threadIdx.x - 128 : threadIdx.x % 128;
        Joined::send(sums, ring + JOINED_SUMS, ring + LANDED, thread);
        Joined::template finish<Sum, DIVISORS>(p, ring + JOINED_SUMS, ring + LANDED, thread, row, p.m, column, columns);
        break;
      }
      typename choose<same<Sum, float>::value, None, float[PARTS][TILE_N / 2]>::type values;
      float (&d)[PARTS][TILE_N / 2] = as_floats(sums, values);
      if constexpr (SPLIT) {
        // Partial sums need the registers first: a few operands at a time, of a place that is found again.
        const TileIndex again = own_tile(unknown(t), tiles_m, tiles_n);
        const u32 first = again.m * TILE_M + row0 + 16 * warp + lane / 4, first_of_columns = first_column + again.n * TILE_N;
        const Layout found(first_of_columns, columns, first, p.m);
        divisors.begin(p, found);
        divide(divisors, d);
#pragma unroll
        for (int i = 0; i < PARTS; ++i)
          emit_fragment<Epilogue, TILE_N / 8, LOAD::AHEAD>(p, d[i], 0, first + 64 * i, p.m, first_of_columns, columns);
      } else if constexpr (STORES::STAGED) {
        epilogue.store(p, layout, d, divisors, STORES(ring, consumer), ordinal / TURNS);
      } else {
        divide(divisors, d);
        epilogue.store(p, layout, d);
      }
    }
  }
  stamp_end(p.stamp, threadIdx.x % (STORES::STAGED ? 32 : 128) == 0);  // the producer is through long before the consumers
}
