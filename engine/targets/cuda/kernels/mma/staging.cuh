// Results of the pipeline on wgmma (mma/wgmma_pipeline.cuh) that go to memory through shared memory and the copy engine: accumulators
// need no exchange between lanes, rows no addresses, and a consumer waits for no load of a full-tile operand (a residual).
//
// A consumer's tile is staged in panels of columns, in SLOTS places of its own that it uses in turn. Its courier, a thread of the
// producer's warpgroup, brings the operand's panel into a place as soon as that is free, several panels and a tile ahead; the
// consumer turns it into the result where it lies; the courier sends the result off while the consumer goes on.
// A lane's accumulators are two neighbouring columns of each block of eight, so the epilogue works on two columns (WIDTH).
//
// What is the same in every column of a row (factor and offset of a residual that is to be normalised) comes when a tile begins. Where there
// are registers for it a lane has that of all its rows, elsewhere that of one of the rows that four lanes share, and gets the others' by shuffles.
//
// MOMENTS: the consumer also adds up the results of each row and their squares, before they are rounded, two instructions an element, from
// which the factors follow that a product of these rows divides them by (scheduler/row_moments.cuh), and with OFFSETS what a norm subtracts.
#pragma once
#include "mma/wgmma_pipeline.cuh"
#include "ptx/matrix_store.cuh"
#include "ptx/pack.cuh"
#include "ptx/prefetch.cuh"
#include "ptx/tma_store.cuh"
#include "scheduler/row_moments.cuh"

static_assert(WIDTH == 2, "what a lane has of a block");
static_assert(!SPLIT && !GROUPED, "");  // nor are there several matrices
constexpr int SLOTS = config::slots;
constexpr int STAGED_COLUMNS = TILE_N % 64 == 0 ? 64 : 32, STAGED_ROW = 2 * STAGED_COLUMNS;  // bytes, under the swizzle of the same name
constexpr int STAGED_PANELS = TILE_N / STAGED_COLUMNS, SLOT_BYTES = CONSUMER_M * STAGED_ROW;
constexpr int STAGING_BARRIERS = RING_BYTES;  // of each consumer: ready[SLOTS], written[SLOTS], then begun of each
constexpr int STAGING = (STAGING_BARRIERS + 8 * (2 * SLOTS + 1) * CONSUMERS + 1023) / 1024 * 1024;  // places start at a swizzle atom
constexpr bool MOMENTS = config::moments, OFFSETS = config::offsets;
static_assert(TILE_N % STAGED_COLUMNS == 0, "");
static_assert(registers_of<Epilogue::Fixed>() < (Epilogue::READS_ROWS ? 5 : 4), "operands that are the same in every row fit beside the accumulators");

// The next panel of a consumer's tiles, as the courier counts them.
struct StagedPanel {
  u32 t, panel;
  DEVICE void advance() {
    if (++panel == STAGED_PANELS) { panel = 0; t += TURNS_OF_TILES * turns(); }
  }
  static constexpr u32 TURNS_OF_TILES = COOPERATIVE ? 1 : CONSUMERS;
};

// What a consumer does with a tile of accumulators.
struct StagedResults {
  using Fixed = Epilogue::Fixed;
  using OfRow = Epilogue::OfRow;
  static constexpr int BLOCKS = STAGED_COLUMNS / 8;  // of a panel
  // What is the same in every row is fetched before the products, where registers are left for all of it. Elsewhere two blocks at a
  // time, which come to the L1 cache before the products, while the other consumer multiplies or the first stages are on their way:
  // else each would be a round trip to the L2 cache that nothing hides. A warp touches all of one operand.
  static constexpr int ROOM = CONSUMER_REGISTERS - RESERVED - ACCUMULATORS, ROWS = 2 * PARTS, OF_ROWS = ROWS * registers_of<OfRow>();
  static constexpr bool HELD = registers_of<Fixed>() * TILE_N / 8 + OF_ROWS <= ROOM;
  // Half of the room is for what the epilogue computes with, and pairs along n take some of it.
  static constexpr bool SHARED_ROWS = Epilogue::READS_ROWS && 2 * (OF_ROWS + (MOMENTS ? 2 * ROWS : 0)) + (CLUSTER_N > 1 ? 16 : 0) >= ROOM;
  static_assert(ROWS <= 4, "one for each of four lanes");
  static constexpr u32 SECTOR = 8, SECTORS = TILE_N / SECTOR;  // the columns of four bytes that the cache gets at once
  Fixed fixed[HELD ? TILE_N / 8 : 2];
  OfRow of_row[SHARED_ROWS ? 1 : ROWS];

  DEVICE void begin_columns(const Params& p, const Layout& layout) {
    if constexpr (HELD) fetch(p, layout, 0, TILE_N / 8);
  }
  DEVICE void begin(const Params& p, const Layout& layout) {  // of rows that do not exist the last one's
#pragma unroll
    for (int i = 0; i < (SHARED_ROWS ? 1 : ROWS); ++i) {
      const u32 row = SHARED_ROWS ? threadIdx.x % ROWS : i;
      of_row[i] = Epilogue::fetch_row(p, min(layout.first_row + 8 * (row % 2) + 64 * (row / 2), p.m - 1));
    }
    if constexpr (!HELD) {
      // All lanes touch something: a branch would make the compiler keep what products read in ordinary registers.
      Epilogue::touch_fixed(p, threadIdx.x / 32 & 3, min(layout.first + SECTOR * min(threadIdx.x & 31, SECTORS - 1), layout.columns - 1));
    }
  }
  // `count`: the tiles that this consumer has stored before.
  template <class DIVISORS, class PLACES>
  DEVICE void store(const Params& p, const Layout& layout, const float (&d)[PARTS][TILE_N / 2], const DIVISORS& divisors, const PLACES& places, u32 count) {
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3;
    // The lane's row of the matrices that move at once, and its chunk of 16 bytes: the first or the second of a pair of blocks.
    const u32 phase = STAGED_ROW == 128 ? lane & 7 : lane >> 1 & 3;
    const u32 own = places.slots + (16 * warp + (lane & 15)) * STAGED_ROW + ((lane >> 4 ^ phase) << 4);
    RowSums rows[2 * PARTS] = {};  // of this lane's columns
    const u32 columns = layout.first < layout.columns ? layout.columns - layout.first : 0;  // of the result from here on
#pragma unroll
    for (int panel = 0; panel < STAGED_PANELS; ++panel) {
      const u32 use = count * STAGED_PANELS + panel;
      const u32 slot = STAGED_PANELS % SLOTS == 0 ? panel % SLOTS : use % SLOTS;
      barrier_wait(places.ready + 8 * slot, use / SLOTS & 1);
      const u32 place = own + slot * SLOT_BYTES;
#pragma unroll
      for (int block = 0; block < BLOCKS; block += 2) {
        if constexpr (!HELD) fetch(p, layout, panel * BLOCKS + block, 2);
#pragma unroll
        for (int i = 0; i < PARTS; ++i) {
          const u32 address = (place ^ 16 * block) + i * 64 * STAGED_ROW;
          u32 r[4] = {};
          if constexpr (Epilogue::READS_TILE) load_matrix_x4(r, address);
          const OfRow rows_own[2] = {of(2 * i), of(2 * i + 1)};
#pragma unroll
          for (int j = 0; j < 4; ++j) {  // rows r and r + 8 of a block, then of the next
            const int element = 4 * (panel * BLOCKS + block + j / 2) + 2 * (j % 2);
            const int row = 2 * i + j % 2;
            const float acc[2] = {divisors.quotient(d[i][element], row), divisors.quotient(d[i][element + 1], row)};
            float made[2];
            r[j] = Epilogue::results(acc, fixed[(HELD ? panel * BLOCKS + block : 0) + j / 2], rows_own[j % 2], r[j], made);
            if constexpr (MOMENTS) {
              if (8 * (panel * BLOCKS + block + j / 2) < columns) {  // which end with a block
                add(rows[row], made[0]);
                add(rows[row], made[1]);
              }
            }
          }
          store_matrix_x4(address, r);
        }
      }
      shared_writes_fence();
      __syncwarp();
      if (lane == 0) barrier_arrive(places.written + 8 * slot);
    }
    if constexpr (MOMENTS) {
      const u32 tiles = (p.n + TILE_N - 1) / TILE_N, tile = layout.first / TILE_N;
      if (tile < tiles) leave_row_factors<PARTS, OFFSETS>(p, rows, layout.first_row - lane / 4, tile, tiles);  // one of a cluster may lie outside
    }
  }

 private:
  // What is the same in all of the lane's row number `row`.
  DEVICE OfRow of(int row) const {
    if constexpr (SHARED_ROWS) return Epilogue::shuffled(of_row[0], row);
    else return of_row[row];
  }
  DEVICE void fetch(const Params& p, const Layout& layout, int first, int blocks) {
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
      const u32 c = layout.first + 8 * (first + i) + 2 * (threadIdx.x & 3);
      if (c < layout.columns) fixed[i] = Epilogue::fetch_fixed(p, c, min(2u, layout.columns - c));
    }
  }
};

// The places and barriers of one consumer, and what its courier does.
struct StagedStores {
  static constexpr bool STAGED = true, BRINGS = Epilogue::READS_TILE;
  static constexpr int PART_ROWS = 64;
  static constexpr int SHARED_BYTES = STAGING + CONSUMERS * SLOTS * SLOT_BYTES;
  using Results = StagedResults;
  u32 consumer, ready, written, begun, slots;
  DEVICE StagedStores(u32 ring, u32 consumer)
      : consumer(consumer), ready(ring + STAGING_BARRIERS + 8 * 2 * SLOTS * consumer), written(ready + 8 * SLOTS),
        begun(ring + STAGING_BARRIERS + 8 * (2 * SLOTS * CONSUMERS + consumer)),
        slots(ring + STAGING + consumer * SLOTS * SLOT_BYTES) {}

  DEVICE static void init(const Params& p, u32 ring) {  // by one thread
    prefetch_tensor_map(p.map_result);
    for (u32 consumer = 0; consumer < CONSUMERS; ++consumer) {
      const StagedStores places(ring, consumer);
      barrier_init(places.begun, 1);
      for (int slot = 0; slot < SLOTS; ++slot) {
        barrier_init(places.ready + 8 * slot, 1);
        barrier_init(places.written + 8 * slot, 4);  // one of each warp
      }
    }
  }

  // By one thread of the consumer, when its first product begins.
  DEVICE void begin() const { barrier_arrive(begun); }

  // By one thread of the producer's warpgroup.
  DEVICE void carry(const Params& p, u32 tiles_m, u32 tiles_n) const {
    const u32 tiles = tiles_m * tiles_n;
    StagedPanel brought{first_turn() + (COOPERATIVE ? 0 : consumer) * turns(), 0}, sent = brought;
    // What the products wait for comes first: all multiprocessors begin at once, and memory is what they wait for.
    if (BRINGS && brought.t < tiles) barrier_wait(begun, 0);
#pragma unroll 1
    for (u32 slot = 0; slot < SLOTS && brought.t < tiles; ++slot) bring(p, brought, slot, tiles_m, tiles_n);
    u32 slot = 0, parity = 0;
#pragma unroll 1
    while (sent.t < tiles) {
      barrier_wait(written + 8 * slot, parity);
      const TileIndex tile = own_tile(sent.t, tiles_m, tiles_n);
      if (is_inside(p, tile, sent)) store_box(p.map_result, slots + slot * SLOT_BYTES, column_of(tile, sent), row_of(tile));
      store_box_commit();
      sent.advance();
      if (brought.t < tiles) {
        store_box_wait_read<0>();
        bring(p, brought, slot, tiles_m, tiles_n);
      }
      if (++slot == SLOTS) { slot = 0; parity ^= 1; }
    }
    store_box_wait();
  }

 private:
  DEVICE u32 row_of(const TileIndex& tile) const { return tile.m * TILE_M + (COOPERATIVE ? consumer * CONSUMER_M : 0); }
  DEVICE static u32 column_of(const TileIndex& tile, const StagedPanel& at) { return tile.n * TILE_N + at.panel * STAGED_COLUMNS; }
  DEVICE bool is_inside(const Params& p, const TileIndex& tile, const StagedPanel& at) const {
    return row_of(tile) < p.m && column_of(tile, at) < p.n;
  }
  // Makes a free place ready for the next panel. P: Params, which has `map_tile` only where there is a tile to bring.
  template <class P> DEVICE void bring(const P& p, StagedPanel& next, u32 slot, u32 tiles_m, u32 tiles_n) const {
    const u32 landed = ready + 8 * slot;
    bool brings = false;
    if constexpr (Epilogue::READS_TILE) {
      const TileIndex tile = own_tile(next.t, tiles_m, tiles_n);
      brings = is_inside(p, tile, next);
      if (brings) {
        barrier_arrive_expect(landed, SLOT_BYTES);
        copy_box(slots + slot * SLOT_BYTES, p.map_tile, landed, column_of(tile, next), row_of(tile));
      }
    }
    if (!brings) barrier_arrive(landed);
    next.advance();
  }
};
