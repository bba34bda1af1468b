// How the operands of several products reach shared memory on wgmma (mma/wgmma_pipeline.cuh): matrices one after the other, along two
// axes of a batch, along each of which an operand may be the same. k is innermost in a. In b k may be, or (ACROSS, operands of 16 bits)
// the columns: its tile then lies in panels of columns whose rows are k, and the instruction transposes it.
// config: across.
#pragma once
#include "mma/wgmma_pipeline.cuh"
#include "ptx/tma_outer.cuh"
#include "ptx/wgmma_panels.cuh"

struct BatchLoad {
  static constexpr bool BATCHED = true, ACROSS = config::across;
  static constexpr int UNROLL = 1, AHEAD = 1;
  static constexpr u32 B_COLUMNS = 128 / sizeof(Element), B_PANEL = TILE_K * 128;  // of a panel of b
  static constexpr u32 STEP = ACROSS ? 16 * 128 >> 4 : 2;  // of a descriptor of b, along k
  static_assert(!ACROSS || (sizeof(Element) == 2 && TILE_N % B_COLUMNS == 0), "");
  static_assert(!SPLIT && !GROUPED && PANELS == 1, "");

  u32 row, column, inner, outer;
  DEVICE BatchLoad(const Params&, u32 row, u32) : row(row) {}
  DEVICE void turn_to(const Params& p, u32 matrix, u32 first_column) {
    outer = matrix / p.inner;
    inner = matrix - outer * p.inner;
    column = first_column;
  }
  DEVICE void operator()(const Params& p, u32 destination, u32 barrier, u32 step) {
    copy_box(destination, p.map_a, barrier, step * TILE_K, row, inner * p.a_inner, outer * p.a_outer);
  }
  DEVICE void second(const Params& p, u32 destination, u32 barrier, u32 step) {
    const u32 b_inner = inner * p.b_inner, b_outer = outer * p.b_outer;
    if constexpr (ACROSS) {
#pragma unroll
      for (int i = 0; i < TILE_N / B_COLUMNS; ++i)
        copy_box(destination + i * B_PANEL, p.map_b, barrier, column + i * B_COLUMNS, step * TILE_K, b_inner, b_outer);
    } else {
      copy_box(destination, p.map_b, barrier, step * TILE_K, column, b_inner, b_outer);
    }
  }
  DEVICE static u64 descriptor(u32 address) {
    if constexpr (ACROSS) return panel_descriptor<128>(address, B_PANEL);
    else return operand_descriptor<128>(address);
  }
  // A template, so that what there is none of for the type is not asked for.
  template <class T = Element> DEVICE static void multiply(Sum (&d)[TILE_N / 2], u64 a, u64 b, u32 accumulate) {
    if constexpr (ACROSS) wgmma_across<TILE_N, T>(d, a, b, accumulate);
    else wgmma<TILE_N, T>(d, a, b, accumulate);
  }
};
