// What a lane has of a tile of results whose rows are places of a grid with more places than the image has pixels (conv_halo.py):
// layouts for epilogue/early.cuh. A place that is no pixel has no row.
#pragma once
#include "epilogue/early.cuh"

// n / d below 2³⁰: `divisor_arguments` of conv_halo.py finds the factor and the shift of d.
DEVICE u32 divided(u32 n, u32 factor, u32 shift) { return static_cast<u32>(static_cast<u64>(n) * factor >> shift); }
// The output pixel at a place of the grid, or NO_PIXEL.
constexpr u32 NO_PIXEL = ~0u;
DEVICE u32 pixel_at(const Params& p, u32 place) {
  const u32 line = divided(place, p.grid_w_factor, p.grid_w_shift), x = place - line * p.grid_w;
  const u32 image = divided(line, p.grid_h_factor, p.grid_h_shift), y = line - image * p.grid_h;
  return x < p.out_w && y < p.out_h && image < p.images ? (image * p.out_h + y) * p.out_w + x : NO_PIXEL;
}

// PARTS fragments of 64 places each, of WIDE columns.
template <int PARTS, int WIDE> struct PlaceRows : FragmentPieces<PARTS, WIDE / 8> {
  static constexpr int TOGETHER = PARTS * WIDE <= 128 ? PARTS * WIDE / 16 : 1;  // finding pixels takes registers
  u32 place;  // the lane's first
  DEVICE PlaceRows(u32 column, u32 columns) : FragmentPieces<PARTS, WIDE / 8>{column, columns} {}
  // `first`: the warpgroup's first place.
  DEVICE void take(u32 first) { place = first + (threadIdx.x / 32 & 3) * 16 + (threadIdx.x & 31) / 4; }
  DEVICE PlaceRows again() const {
    PlaceRows same = *this;
    same.place = unknown(place);
    return same;
  }
  DEVICE bool row(const Params& p, int piece, u32& found) const {
    found = pixel_at(p, place + FragmentPieces<PARTS, WIDE / 8>::row_of(piece));
    return found != NO_PIXEL;
  }
};
// The same of transposed results, PARTS fragments of 64 columns each, of WIDE places: two pieces at a time, from 16 pixels that lie
// beside each other.
template <int PARTS, int WIDE> struct PlaceColumns {
  static constexpr int PIECES = WIDE / 16, TOTAL = PARTS * PIECES, CHUNK = 2, FIXED = PARTS;
  static constexpr int TOGETHER = CHUNK;
  static constexpr bool BLOCKS_OF_ROWS = false;
  static_assert(PIECES % CHUNK == 0, "");
  u32 place, first, columns;
  DEVICE PlaceColumns(u32 column, u32 columns) : columns(columns) {
    first = column + 16 * (threadIdx.x / 32 & 3) + 8 * (threadIdx.x / 4 & 1);
  }
  DEVICE void take(u32 first_place) {
    const u32 lane = threadIdx.x & 31, octet = lane / 4;
    place = first_place + 2 * (lane & 3) + (octet >> 1 & 1) + 8 * (octet >> 2);
  }
  DEVICE PlaceColumns again() const {
    PlaceColumns same = *this;
    same.place = unknown(place);
    return same;
  }
  DEVICE static constexpr int fixed_of(int piece) { return piece / PIECES; }
  DEVICE u32 column(int group) const { return first + 64 * group; }
  DEVICE bool row(const Params& p, int piece, u32& found) const {
    found = pixel_at(p, place + 16 * (piece % PIECES));
    return found != NO_PIXEL;
  }
  DEVICE void gather(const float (&d)[PARTS][WIDE / 2], int piece, float (&v)[2][8]) const {
    float sixteen[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) sixteen[j] = d[piece / PIECES][8 * (piece % PIECES) + 4 * (j / 2 % 4) + 2 * (j / 8) + j % 2];
    transpose_octet(sixteen, threadIdx.x / 4 & 7);
#pragma unroll
    for (int j = 0; j < 16; ++j) v[j / 8][j % 8] = sixteen[j];
  }
};
template <bool SWAPPED, int PARTS, int WIDE> struct PlaceLayout { using Type = PlaceRows<PARTS, WIDE>; };
template <int PARTS, int WIDE> struct PlaceLayout<true, PARTS, WIDE> { using Type = PlaceColumns<PARTS, WIDE>; };
