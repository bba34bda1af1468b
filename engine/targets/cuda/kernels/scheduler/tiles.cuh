// The order in which the tiles of a matrix are taken: bands of so many rows of tiles, column by column inside a band, so that
// the blocks that run together read few distinct rows of A and columns of B and the L2 cache serves them.
#pragma once
#include "types.cuh"

struct TileIndex { u32 m, n; };

DEVICE TileIndex tile_of(u32 index, u32 tiles_m, u32 tiles_n, u32 rows_of_band) {
  const u32 per_band = rows_of_band * tiles_n, band = index / per_band, within = index - band * per_band;
  const u32 rows = min(rows_of_band, tiles_m - band * rows_of_band);
  return {band * rows_of_band + within % rows, within / rows};
}
