// Which piece of packed attention comes when: sequences of any lengths lie one after the other, and how long they are only the device
// knows. One warp of every block sorts them, the longest first, into bins of lengths, so that what is dealt last is short; all blocks
// come to the same order. An item is then found by its number: the heads of a sequence follow each other, and of a head its tiles of
// queries. Behind the last sequence come the tokens that belong to none: no key for them, and a result of zeros.
// `Sequences` comes from attention_operands.py; attention_wgmma.cuh includes this behind its constants.
#pragma once
#include "attention_items.cuh"
#include "attention_spans.cuh"

// The sequence that comes in this place, and the tiles of queries of all places up to it, of one head.
struct Place { u32 sequence, tiles; };

// The lanes whose bin is this lane's.
DEVICE u32 lanes_alike(u32 bin) {
  u32 alike = ~0u;
#pragma unroll
  for (int bit = 0; bit < 6; ++bit) {
    const u32 set = __ballot_sync(~0u, bin >> bit & 1);
    alike &= bin >> bit & 1 ? set : ~set;
  }
  return alike;
}

// Fills in `places`, one more than there are sequences. `bins` is room for 32 numbers. Called by a whole warp.
DEVICE void sort_sequences(const Params& p, Place* places, u32* bins) {
  const u32 lane = threadIdx.x & 31, below = (1u << lane) - 1;
  u32 longest = 0;
#pragma unroll 1
  for (u32 first = lane; first < Sequences::count(p); first += 128) {
    u32 begin[4], end[4];  // all loads are under way before the first is used, and none is branched around
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const u32 i = min(first + 32 * j, Sequences::count(p) - 1);
      begin[j] = Sequences::start(p, i);
      end[j] = Sequences::start(p, i + 1);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const u32 rows = span_between(p, begin[j], end[j]).rows;
      if (first + 32 * j < Sequences::count(p)) places[first + 32 * j].tiles = rows;  // for now, and in their own order
      longest = max(longest, rows);
    }
  }
  __syncwarp();
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) longest = max(longest, __shfl_xor_sync(~0u, longest, distance));
  // A block with a single item needs no order.
  const int shift = config::dynamic ? max(0, 27 - __clz(longest)) : 31;  // lengths fall into 32 bins, or into one
  // Lanes without a sequence have a bin of their own, which is not counted.
  const auto bin_of = [&](u32 i) { return i < Sequences::count(p) ? (longest >> shift) - (places[i].tiles >> shift) : 32; };
  bins[lane] = 0;
  __syncwarp();
#pragma unroll 1
  for (u32 first = 0; first < Sequences::count(p); first += 32) {
    const u32 bin = bin_of(first + lane), alike = lanes_alike(bin);
    if (bin < 32 && (alike & below) == 0) bins[bin] += __popc(alike);
    __syncwarp();
  }
  const u32 count = bins[lane];
  u32 before = count;  // in bins up to this one
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const u32 other = __shfl_up_sync(~0u, before, distance);
    if (lane >= distance) before += other;
  }
  bins[lane] = before - count;
  __syncwarp();
#pragma unroll 1
  for (u32 first = 0; first < Sequences::count(p); first += 32) {
    const u32 bin = bin_of(first + lane), alike = lanes_alike(bin);
    if (bin < 32) places[bins[bin] + __popc(alike & below)].sequence = first + lane;
    __syncwarp();
    if (bin < 32 && (alike & below) == 0) bins[bin] += __popc(alike);
    __syncwarp();
  }
  if (lane == 0) places[Sequences::count(p)].sequence = Sequences::count(p);
  __syncwarp();
  u32 tiles = 0;
#pragma unroll 1
  for (u32 first = 0; first <= Sequences::count(p); first += 32) {
    const u32 i = first + lane;
    u32 sum = i <= Sequences::count(p) ? (span_of(p, places[i].sequence).rows + QUERIES - 1) / QUERIES : 0;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const u32 other = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (i <= Sequences::count(p)) places[i].tiles = tiles + sum;
    tiles += __shfl_sync(~0u, sum, 31);
  }
  __syncwarp();
}

// Item `index`; an empty one where there are no more. `place` is where it was looked for last, and only grows, as indices do. Called by
// a whole warp.
DEVICE Item packed_item(const Params& p, const Place* places, u32 index, u32& place) {
  const u32 lane = threadIdx.x & 31;
  for (;;) {
    const u32 i = place + lane;
    const u32 past = __popc(__ballot_sync(~0u, i <= Sequences::count(p) && index >= p.heads * places[i].tiles));
    place += past;
    if (past < 32) break;
  }
  if (place > Sequences::count(p)) return {};
  const u32 before = place > 0 ? places[place - 1].tiles : 0, tiles = places[place].tiles - before;
  const u32 within = index - p.heads * before, head = within / tiles, tile = within - head * tiles;
  const Span span = span_of(p, places[place].sequence);
  Item item{};
  // Under a causal mask the last tile is the longest.
  item.query0 = (CAUSAL ? tiles - 1 - tile : tile) * QUERIES;
  item.group = head;
  item.tiles = (min(span.keys, CAUSAL ? item.query0 + QUERIES : span.keys) + KEYS - 1) / KEYS;
  item.begin = span.begin;
  item.rows = span.rows;
  item.keys = span.keys;
  return item;
}
