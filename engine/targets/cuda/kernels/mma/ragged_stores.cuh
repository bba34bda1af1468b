// Results of 16 bits of the pipeline on wgmma (mma/wgmma_pipeline.cuh) whose rows begin anywhere, so that the copy engine cannot take
// them. A warp writes a panel of its 16 rows to shared memory, each as far behind a multiple of 32 bytes as it lies in memory. It then
// stores whole sectors, 16 bytes a lane, whole lines of neighbouring lanes; what reaches into the next sector waits for the next panel.
// Only the two ends of a row in a tile go to memory element by element. No warp waits for another one.
// As in mma/staging.cuh the epilogue works on the two neighbouring columns of a block that a lane has (WIDTH), of operands that are the
// same in every row.
// DENSE: a tile has all columns, and rows follow each other without a gap. Then a warp's 16 rows are one piece of memory, 32 bytes times
// the columns long, and lies in shared memory as it does there.
// config: slots: how much shared memory a consumer has, as there; words: rows begin at multiples of 4 bytes; dense.
#pragma once
#include "mma/wgmma_pipeline.cuh"
#include "ptx/pack.cuh"

static_assert(WIDTH == 2, "what a lane has of a block");
static_assert(!SPLIT && !GROUPED, "");
static_assert(sizeof(Epilogue::Result) == 2 && !Epilogue::READS_TILE, "");
constexpr int SLOTS = config::slots;
constexpr bool WORDS = config::words, DENSE = config::dense;
constexpr u32 SECTOR = 32;
// As the host counts places of staged results: the first begins at a multiple of 1024 bytes.
constexpr int RAGGED = (RING_BYTES + 8 * 2 * CONSUMERS * SLOTS + 1023) / 1024 * 1024;
constexpr int WARP_BYTES = SLOTS * CONSUMER_M * (TILE_N % 64 == 0 ? 128 : 64) / 4;
// From row to row: an odd number of 16 bytes, so that rows lie in different banks.
constexpr u32 pitch_of(u32 columns) { return 2 * columns + SECTOR + 16; }
constexpr u32 RAGGED_COLUMNS = TILE_N % 64 == 0 && 16 * pitch_of(64) <= WARP_BYTES ? 64 : 32;
constexpr u32 PITCH = pitch_of(RAGGED_COLUMNS), RAGGED_BYTES = 2 * RAGGED_COLUMNS, RAGGED_PANELS = TILE_N / RAGGED_COLUMNS;
static_assert(TILE_N % RAGGED_COLUMNS == 0 && 16 * PITCH <= WARP_BYTES, "a warp's panel fits");
static_assert(registers_of<Epilogue::Fixed>() < 4, "operands that are the same in every row fit beside the accumulators");

// One row of a tile in memory: where its first sector begins, and its columns' bytes from there on.
struct RaggedRow {
  u8* sector;
  u32 begin, end;  // none where they are alike
  DEVICE RaggedRow(const Params& p, u32 row, u32 rows, u32 column, u32 columns) {
    u8* const first = reinterpret_cast<u8*>(p.result + row * p.result_stride + column);
    begin = static_cast<u32>(reinterpret_cast<u64>(first)) % SECTOR;
    sector = first - begin;
    end = begin + (row < rows ? 2 * columns : 0);
  }
  DEVICE bool has_all(u32 at) const { return at >= begin && at + 16 <= end; }
  // What it has of 16 bytes of its sectors: in as few pieces as their alignment allows.
  DEVICE void store_part(u32 at, uint4 v) const {
    if (has_all(at)) {
      *reinterpret_cast<uint4*>(sector + at) = v;
      return;
    }
    u32* const place = reinterpret_cast<u32*>(sector + at);
    const u32 last = end > at ? min(end - at, 16u) / 2 : 0;  // elements, of eight
    u32 x = begin > at ? min(begin - at, 16u) / 2 : 0;
    x += store_half(x % 2 == 1 && x < last, place, v, x);
    x += store_word(x % 4 == 2 && x + 2 <= last, place, v, x);
    const bool four = x % 4 == 0 && x + 4 <= last;
    store_global_8_if(four, place + x / 2, x == 0 ? v.x : v.z, x == 0 ? v.y : v.w);
    x += four ? 4 : 0;
    x += store_word(x % 2 == 0 && x + 2 <= last, place, v, x);
    store_half(x % 2 == 0 && x < last, place, v, x);
  }

 private:
  DEVICE static u32 word_of(uint4 v, u32 x) { return x < 2 ? v.x : x < 4 ? v.y : x < 6 ? v.z : v.w; }
  DEVICE static u32 store_half(bool condition, u32* place, uint4 v, u32 x) {
    store_global_2_if(condition, reinterpret_cast<u16*>(place) + x, static_cast<u16>(word_of(v, x) >> 16 * (x % 2)));
    return condition;
  }
  DEVICE static u32 store_word(bool condition, u32* place, uint4 v, u32 x) {
    store_global_4_if(condition, place + x / 2, word_of(v, x));
    return condition ? 2 : 0;
  }
};

// What a consumer does with a tile of accumulators.
struct RaggedResults {
  using Fixed = Epilogue::Fixed;
  static constexpr int BLOCKS = RAGGED_COLUMNS / 8;  // of a panel
  // As staged results have it: all of it before the products, or two blocks at a time.
  static constexpr bool HELD = registers_of<Fixed>() * TILE_N / 8 <= CONSUMER_REGISTERS - RESERVED - ACCUMULATORS;
  Fixed fixed[HELD ? TILE_N / 8 : 2];

  DEVICE void begin_columns(const Params& p, const Layout& layout) {
    if constexpr (HELD) fetch(p, layout, 0, TILE_N / 8);
  }
  DEVICE void begin(const Params&, const Layout&) {}
  template <class DIVISORS, class PLACES>
  DEVICE void store(const Params& p, const Layout& layout, const float (&d)[PARTS][TILE_N / 2], const DIVISORS& divisors, const PLACES& places, u32) {
    if constexpr (DENSE) return store_dense(p, layout, d, divisors, places.first + (threadIdx.x / 32 & 3) * WARP_BYTES);
    const u32 columns = layout.first < layout.columns ? min(static_cast<u32>(TILE_N), layout.columns - layout.first) : 0;
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
#pragma unroll
      for (int panel = 0; panel < RAGGED_PANELS; ++panel) {
        if (panel * RAGGED_BYTES >= 2 * columns + SECTOR) continue;  // nothing of the result
        // Found again for every panel, so that it does not take registers all the time.
        const u32 thread = unknown(threadIdx.x), lane = thread & 31, panel_place = places.first + (thread / 32 & 3) * WARP_BYTES;
        const u32 row = unknown(layout.first_row) + 64 * i, first_row = row - lane / 4, place = panel_place + lane / 4 * PITCH + 4 * (lane & 3);
        const u32 own[2] = {place + RaggedRow(p, row, layout.rows, layout.first, columns).begin,
                            place + 8 * PITCH + RaggedRow(p, row + 8, layout.rows, layout.first, columns).begin};
#pragma unroll
        for (int block = 0; block < BLOCKS; ++block) {
          if constexpr (!HELD) {
            if (block % 2 == 0) fetch(p, layout, panel * BLOCKS + block, 2);
          }
#pragma unroll
          for (int j = 0; j < 2; ++j) {  // rows r and r + 8
            const int element = 4 * (panel * BLOCKS + block) + 2 * j;
            const float acc[2] = {divisors.quotient(d[i][element], 2 * i + j), divisors.quotient(d[i][element + 1], 2 * i + j)};
            float made[2];
            put(own[j] + 16 * block, Epilogue::results(acc, fixed[HELD ? panel * BLOCKS + block : block % 2], Epilogue::OfRow{}, 0, made));
          }
        }
        __syncwarp();
        store_panel(p, layout, columns, first_row, panel_place, panel);
      }
    }
  }

 private:
  // Two neighbouring results, or as many of them as there are.
  DEVICE static void put(u32 address, u32 pair, u32 count = 2) {
    if constexpr (WORDS) {
      if (count > 0) store_shared_4(address, pair);
    } else {
      if (count > 0) store_shared_2(address, static_cast<u16>(pair));
      if (count > 1) store_shared_2(address + 2, static_cast<u16>(pair >> 16));
    }
  }
  template <class DIVISORS>
  DEVICE void store_dense(const Params& p, const Layout& layout, const float (&d)[PARTS][TILE_N / 2], const DIVISORS& divisors, u32 place) {
    const u32 lane = threadIdx.x & 31, columns = layout.columns, pitch = 2 * columns;
#pragma unroll
    for (int i = 0; i < PARTS; ++i) {
      const u32 first_row = unknown(layout.first_row) - lane / 4 + 64 * i, rows = first_row < layout.rows ? min(16u, layout.rows - first_row) : 0;
      const RaggedRow all(p, first_row, rows > 0 ? first_row + 1 : 0, 0, rows * columns);  // as if all rows were one
      const u32 own = place + all.begin + lane / 4 * pitch + 4 * (lane & 3);
#pragma unroll
      for (int block = 0; block < TILE_N / 8; ++block) {
        if constexpr (!HELD) {
          if (block % 2 == 0) fetch(p, layout, block, 2);
        }
        const u32 c = 8 * block + 2 * (lane & 3), count = c < columns ? columns - c : 0;
#pragma unroll
        for (int j = 0; j < 2; ++j) {  // rows r and r + 8
          const int element = 4 * block + 2 * j;
          const float acc[2] = {divisors.quotient(d[i][element], 2 * i + j), divisors.quotient(d[i][element + 1], 2 * i + j)};
          float made[2];
          put(own + 8 * j * pitch + 16 * block, Epilogue::results(acc, fixed[HELD ? block : block % 2], Epilogue::OfRow{}, 0, made), count);
        }
      }
      __syncwarp();
#pragma unroll 4
      for (u32 at = 16 * lane; at < all.end; at += 16 * 32) all.store_part(at, load_shared_16(place + at));
      __syncwarp();
    }
  }
  DEVICE static void store_panel(const Params& p, const Layout& layout, u32 columns, u32 first_row, u32 place, int panel) {
    constexpr u32 PIECES = RAGGED_BYTES / 16, ROWS = 32 / PIECES;  // of 16 bytes, and rows at once
    constexpr u32 TOGETHER = PARTS > 1 && ACCUMULATORS >= 128 ? ROWS : 16;  // rows; beside more there are no registers for all
    const u32 lane = threadIdx.x & 31, from = panel * RAGGED_BYTES;  // of the row's sectors
#pragma unroll 1
    for (u32 begin = 0; begin < 16; begin += TOGETHER) {
      uint4 v[TOGETHER / ROWS];
#pragma unroll
      for (u32 i = 0; i < TOGETHER / ROWS; ++i) v[i] = load_shared_16(place + (begin + i * ROWS + lane / PIECES) * PITCH + 16 * (lane % PIECES));
#pragma unroll
      for (u32 i = 0; i < TOGETHER / ROWS; ++i) {
        const RaggedRow row(p, first_row + begin + i * ROWS + lane / PIECES, layout.rows, layout.first, columns);
        const u32 at = from + 16 * (lane % PIECES);
        store_global_16_if(row.has_all(at), row.sector + at, v[i]);
      }
    }
    // A lane has one of the two halves of a sector of a row: of the first, of the one in which the row ends, and of the one in which
    // the next panel begins.
    const u32 r = lane / 2, half = 16 * (lane % 2), own = place + r * PITCH + half;
    const RaggedRow row(p, first_row + r, layout.rows, layout.first, columns);
    const u32 last = row.end / SECTOR * SECTOR, rest = from + RAGGED_BYTES;
#pragma unroll 1
    for (int part = 0; part < 3; ++part) {  // one after the other: registers
      const u32 at = part == 0 ? 0 : part == 1 ? last : rest;
      bool wanted = part == 0 ? panel == 0 && row.begin > half : panel + 1 == RAGGED_PANELS;
      if (part == 1) wanted = last >= from && last < rest && (last > 0 || row.begin <= half) && row.end % SECTOR > half && row.end % SECTOR < half + 16;
      if (wanted) row.store_part(at + half, load_shared_16(own + at - from));
    }
    if (panel + 1 < RAGGED_PANELS) {
      const uint4 carried = load_shared_16(own + RAGGED_BYTES);
      __syncwarp();
      store_shared_16(own, carried);
    }
    __syncwarp();
  }
  DEVICE void fetch(const Params& p, const Layout& layout, int first, int blocks) {
#pragma unroll
    for (int i = 0; i < blocks; ++i) {
      const u32 c = layout.first + 8 * (first + i) + 2 * (threadIdx.x & 3);
      if (c < layout.columns) fixed[i] = Epilogue::fetch_fixed(p, c, min(2u, layout.columns - c));
    }
  }
};

// Consumers store their results themselves, each warp through shared memory of its own.
struct RaggedStores {
  static constexpr bool STAGED = true, BRINGS = false;
  static constexpr int PART_ROWS = 64;
  static constexpr int SHARED_BYTES = RAGGED + CONSUMERS * 4 * WARP_BYTES;
  using Results = RaggedResults;
  u32 first;
  DEVICE RaggedStores(u32 ring, u32 consumer) : first(ring + RAGGED + consumer * 4 * WARP_BYTES) {}
  DEVICE static void init(const Params&, u32) {}
  DEVICE void carry(const Params&, u32, u32) const {}
};
