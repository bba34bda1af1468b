// The order in which blocks of 128 threads take tiles of packed sequences (attention_short.cuh): by their number of tiles, those with
// the most first, so that what comes last is short. All blocks come to the same order. Behind the last sequence come the tokens that
// belong to none. Included there behind the constants.
#pragma once
#include "attention_spans.cuh"

constexpr int PLACES = config::places, CHUNKS = PLACES / 128;  // a thread has so many sequences
constexpr int CLASSES = 8;  // by tiles of queries: eight or more, seven, … one; what is empty has no place
static_assert(PLACES % 128 == 0, "");

// Of each place: the first token of its sequence, how many there are, and the tiles of queries of all places before it.
struct Order {
  u32 *begin, *rows, *before;
  u32 tiles;  // of queries, of all places
  Span behind;  // what belongs to no sequence
};

// The sum of what the threads before this one have. `all`: of all. `sums` is room for four numbers.
DEVICE u32 sum_before(u32 mine, u32* sums, u32& all) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  u32 sum = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const u32 other = __shfl_up_sync(~0u, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == 31) sums[warp] = sum;
  __syncthreads();
  all = 0;
  u32 before = sum - mine;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 other = sums[i];
    before += i < warp ? other : 0;
    all += other;
  }
  __syncthreads();
  return before;
}

DEVICE u32 tiles_of(u32 rows) { return (rows + QUERIES - 1) / QUERIES; }

// The places of this thread's sequences, of so many rows each: by class, and of a class as they lie. Those without rows have none.
// Called by all threads of the block.
DEVICE void find_places(const Span (&spans)[CHUNKS], u32* scratch, u32 (&found)[CHUNKS]) {
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32, below = (1u << lane) - 1;
  u32* const counts = scratch + 4;  // of a class in 32 sequences, class after class
  u32 kinds[CHUNKS], ranks[CHUNKS] = {};
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const u32 tiles = tiles_of(spans[c].rows);
    kinds[c] = tiles < CLASSES ? CLASSES - tiles : 0;
    u32 alike = 0;
#pragma unroll
    for (int kind = 0; kind < CLASSES; ++kind) {
      const u32 lanes = __ballot_sync(~0u, kinds[c] == kind);
      ranks[c] = kinds[c] == kind ? __popc(lanes & below) : ranks[c];
      alike = lane == kind ? __popc(lanes) : alike;
    }
    if (lane < CLASSES) counts[lane * 4 * CHUNKS + 4 * c + warp] = alike;
  }
  __syncthreads();
  const bool counts_one = threadIdx.x < CLASSES * 4 * CHUNKS;
  u32 placed;
  const u32 first = sum_before(counts_one ? counts[threadIdx.x] : 0, scratch, placed);
  if (counts_one) counts[threadIdx.x] = first;
  __syncthreads();
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c)
    found[c] = kinds[c] < CLASSES ? counts[kinds[c] * 4 * CHUNKS + 4 * c + warp] + ranks[c] : PLACES;
}

// Fills in the places. `scratch` is room for 4 + 32 · CHUNKS numbers. Called by all threads of the block, which may read the places then.
DEVICE void order_sequences(const Params& p, Order& order, u32* scratch) {
  const u32 count = Sequences::count(p);
  u32 start[CHUNKS], next[CHUNKS];  // all loads are under way before the first is used, and none is branched around
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const u32 i = min(128 * c + threadIdx.x, count - 1);
    start[c] = Sequences::start(p, i);
    next[c] = Sequences::start(p, i + 1);
  }
  order.behind = span_of(p, count);
  Span spans[CHUNKS];
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const u32 i = 128 * c + threadIdx.x;
    spans[c] = span_between(p, start[c], next[c]);
    if (i >= count) spans[c].rows = 0;
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) order.rows[128 * c + threadIdx.x] = 0;  // where there is no sequence
  u32 found[CHUNKS];
  find_places(spans, scratch, found);
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    if (found[c] >= PLACES) continue;
    order.begin[found[c]] = spans[c].begin;
    order.rows[found[c]] = spans[c].rows;
  }
  __syncthreads();
  u32 tiles[CHUNKS], sum = 0;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    tiles[c] = tiles_of(order.rows[CHUNKS * threadIdx.x + c]);
    sum += tiles[c];
  }
  u32 before = sum_before(sum, scratch, order.tiles);
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    order.before[CHUNKS * threadIdx.x + c] = before;
    before += tiles[c];
  }
  __syncthreads();
}

// A tile of queries of one head, the heads of k and v that it reads, and how many tiles of keys it meets: none where they belong to no
// sequence. Counted from the first token of its sequence. One without rows: there is nothing more. NOTES: nothing here branches by lane,
// or NVRTC 13 keeps descriptors of products in ordinary registers.
struct alignas(16) Piece { u32 query0, head, k_head, v_head, begin, rows, keys, tiles; };

DEVICE Piece piece_at(const Params& p, const Order& order, u32 index) {
  const u32 tile = index / p.heads;  // the heads of a tile follow each other
  Piece piece;
  u32 place = 0;  // the last one that begins at this tile or before it: of those that begin at one it alone has tiles, if any does
#pragma unroll
  for (u32 step = PLACES / 2; step > 0; step /= 2)
    if (order.before[place + step] <= tile) place += step;
  const bool past = tile >= order.tiles;
  const u32 within = tile - (past ? order.tiles : order.before[place]);
  piece.query0 = within * QUERIES;
  piece.head = index - tile * p.heads;
  piece.k_head = piece.head / p.heads_per_k;
  piece.v_head = piece.head / p.heads_per_v;
  piece.begin = past ? order.behind.begin : order.begin[place];
  piece.rows = past ? (within < tiles_of(order.behind.rows) ? order.behind.rows : 0) : order.rows[place];
  piece.keys = past ? 0 : piece.rows;
  piece.tiles = (min(piece.keys, CAUSAL ? piece.query0 + QUERIES : piece.keys) + KEYS - 1) / KEYS;
  return piece;
}
