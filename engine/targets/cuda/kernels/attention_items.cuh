// What a block of attention_wgmma.cuh works on, piece by piece. Included there behind the constants.
#pragma once
#include "types.cuh"

// A tile of queries of one head (`group` counts batch and heads), how many tiles of keys it meets, and `live`: a bit for each of them
// where some are skipped; in a window the first of them; where they ascend the next one. Of packed sequences, too: where the sequence
// begins, its queries and its keys. The last item of a block says that there is nothing more: it is empty; others meet a tile of keys or
// have, packed, queries without any.
struct alignas(16) Item { u32 query0, group, tiles, live, begin, rows, keys; };
DEVICE bool nothing_more(const Item& item) { return (PACKED ? item.rows : item.tiles) == 0; }

// The sequence of an item: its first token, its queries and its keys. An item's queries and keys are counted from the first token.
DEVICE u32 begin_of(const Item& item) { return PACKED ? item.begin : 0; }
DEVICE u32 rows_of(const Params& p, const Item& item) { return PACKED ? item.rows : p.queries; }
DEVICE u32 keys_of(const Params& p, const Item& item) { return PACKED ? item.keys : p.keys; }

// The first key that a query sees, and the one behind the last, of `keys`.
DEVICE u32 keys_from(const Params& p, u32 query) {
  return WINDOW && query >= Window::size(p) ? query + 1 - Window::size(p) : 0;
}
DEVICE u32 keys_to(const Params& p, u32 query, u32 keys) {
  return CAUSAL ? min(keys, query + 1) : WINDOW ? min(keys, query + Window::size(p)) : keys;
}

// The first tile of keys that an item meets.
DEVICE u32 first_tile(const Item& item) { return WINDOW ? item.live : 0; }

DEVICE Item item_of(const Params& p, u32 index) {
  const u32 query_tiles = (p.queries + QUERIES - 1) / QUERIES, per_band = GROUPS * query_tiles;
  const u32 band = index / per_band, within = index - band * per_band, groups = min(static_cast<u32>(GROUPS), p.groups - band * GROUPS);
  const u32 query0 = (query_tiles - 1 - within / groups) * QUERIES, keys = keys_to(p, query0 + QUERIES - 1, p.keys);
  Item item{};
  item.query0 = query0;
  item.group = band * GROUPS + within % groups;
  item.tiles = (keys + KEYS - 1) / KEYS;
  if (WINDOW) {
    item.live = min(keys_from(p, query0) / KEYS, item.tiles - 1);  // one at least, where there are more queries than keys
    item.tiles -= item.live;
  }
  return item;
}

// The piece of the one packed sequence, of so many tokens, that is piece `item` of all of them: where it ends keys end, not the rows, of
// which those behind are zeros. It meets a tile of keys in any case, which may be on its way before the length is known.
DEVICE Item single_item(const Params& p, Item item, u32 length) {
  item.rows = p.queries;
  item.keys = length;
  item.tiles = length <= item.query0 ? 1 : (min(length, CAUSAL ? item.query0 + QUERIES : length) + KEYS - 1) / KEYS;
  return item;
}

// The tile of keys that an item takes next, which has `left` of them left.
DEVICE u32 next_tile(Item& item, u32 left) {
  if (ASCENDING) return item.live++;
  if (!SKIPS) return first_tile(item) + left - 1;
  const u32 tile = __ffs(item.live) - 1;
  item.live &= item.live - 1;
  return tile;
}

// The tiles at the end of the item's that the 64 queries from `first_query` on see no key of; all where there is no query.
DEVICE u32 hidden_tiles(const Params& p, const Item& item, u32 first_query) {
  if (first_query >= (SINGLE ? item.keys : rows_of(p, item))) return item.tiles;
  if (WINDOW) {
    const u32 end = (keys_to(p, first_query + 63, keys_of(p, item)) + KEYS - 1) / KEYS;
    return item.tiles - (end - first_tile(item));
  }
  return CAUSAL ? item.tiles - (min(keys_of(p, item), first_query + 64) + KEYS - 1) / KEYS : 0;
}

// Those at the beginning, where there are such queries; one of the others stays.
DEVICE u32 hidden_before(const Params& p, const Item& item, u32 first_query, u32 hidden) {
  if (!WINDOW) return 0;
  return min(keys_from(p, first_query) / KEYS - first_tile(item), item.tiles - hidden - 1);
}

// Whether the keys of its sequence end within the tile: what is behind becomes zeros.
DEVICE bool is_cut(const Params& p, const Item& item, u32 tile) { return (tile + 1) * KEYS > keys_of(p, item); }
