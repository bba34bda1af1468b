// What a block of attention_wgmma.cuh works on, piece by piece. Included there behind the constants.
#pragma once
#include "types.cuh"

// A tile of queries of one head (`group` counts batch and heads), how many tiles of keys it meets, and a bit for each of them where some
// are skipped. Of packed sequences, too: where the sequence begins, its queries and its keys. The last item of a block says that there
// is nothing more: it is empty; others meet a tile of keys or have, packed, queries without any.
struct alignas(16) Item { u32 query0, group, tiles, live, begin, rows, keys; };
DEVICE bool nothing_more(const Item& item) { return (PACKED ? item.rows : item.tiles) == 0; }

// The sequence of an item: its first token, its queries and its keys. An item's queries and keys are counted from the first token.
DEVICE u32 begin_of(const Item& item) { return PACKED ? item.begin : 0; }
DEVICE u32 rows_of(const Params& p, const Item& item) { return PACKED ? item.rows : p.queries; }
DEVICE u32 keys_of(const Params& p, const Item& item) { return PACKED ? item.keys : p.keys; }

DEVICE Item item_of(const Params& p, u32 index) {
  const u32 query_tiles = (p.queries + QUERIES - 1) / QUERIES, per_band = GROUPS * query_tiles;
  const u32 band = index / per_band, within = index - band * per_band, groups = min(static_cast<u32>(GROUPS), p.groups - band * GROUPS);
  const u32 query0 = (query_tiles - 1 - within / groups) * QUERIES, keys = CAUSAL ? min(p.keys, query0 + QUERIES) : p.keys;
  Item item{};
  item.query0 = query0;
  item.group = band * GROUPS + within % groups;
  item.tiles = (keys + KEYS - 1) / KEYS;
  return item;
}

// The tile of keys that an item takes next, which has `left` of them left.
DEVICE u32 next_tile(Item& item, u32 left) {
  if (!SKIPS) return left - 1;
  const u32 tile = __ffs(item.live) - 1;
  item.live &= item.live - 1;
  return tile;
}

// The tiles at the end of the item's that the 64 queries from `first_query` on see no key of; all where there is no query.
DEVICE u32 hidden_tiles(const Params& p, const Item& item, u32 first_query) {
  if (first_query >= rows_of(p, item)) return item.tiles;
  return CAUSAL ? item.tiles - (min(keys_of(p, item), first_query + 64) + KEYS - 1) / KEYS : 0;
}

// Whether the tile holds keys of other sequences.
DEVICE bool is_cut(const Params& p, const Item& item, u32 tile) { return (tile + 1) * KEYS > keys_of(p, item); }
