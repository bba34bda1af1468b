// The order in which the tiles of a matrix are taken: bands of GROUP rows of tiles, column by column inside a band, so that
// the blocks that run together read few distinct rows of A and columns of B and the L2 cache serves them.
#pragma once
#include "ptx/arithmetic.cuh"

struct TileIndex { u32 m, n; };

template <int GROUP> DEVICE TileIndex tile_of(u32 index, u32 tiles_m, u32 tiles_n) {
  if constexpr (GROUP == 1) {
    // NOTES: nothing of it is kept from tile to tile, or NVRTC 13.0 lacks registers for products in turn.
    const u32 columns = unknown(tiles_n), m = unknown(index) / columns;
    return {m, unknown(index) - m * columns};
  }
  const u32 per_band = GROUP * tiles_n;
  const u32 band = index / per_band, within = index - band * per_band;
  const u32 rows = min(static_cast<u32>(GROUP), tiles_m - band * GROUP);
  return {band * GROUP + within % rows, within / rows};
}
