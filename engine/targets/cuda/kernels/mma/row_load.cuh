// How a product's operands reach shared memory on wgmma (mma/wgmma_pipeline.cuh): as rows of matrices.
// IN_PARTS: both are sums of two matrices of bf16, big + small, of which the columns of a step lie in turn. Three steps multiply them:
// big · big, big · small, small · big; the product of the small parts is below the rounding of the others. p.k counts all steps.
// DIVIDED: rows of the first one are divided by their standard deviation.
// config: in_parts, divided.
#pragma once
#include "mma/divided_rows.cuh"
#include "mma/wgmma_pipeline.cuh"

constexpr bool IN_PARTS = config::in_parts, DIVIDED = config::divided;
using ProductRows = typename choose<DIVIDED, DividedRows, WholeRows>::type;
static_assert(!IN_PARTS || !DIVIDED, "p.k counts columns");

// The columns of a step where in the one of three that is `small` the operand's small part is wanted.
DEVICE u32 column_of(u32 step, u32 small) { return (IN_PARTS ? step / 3 * 2 + (step % 3 == small) : step) * TILE_K; }

struct RowLoad {
  static constexpr bool BATCHED = false;
  static constexpr int UNROLL = 4, PIECES = TILE_N / 16;
  // Registers for what the epilogue reads, which of a piece are those of a bias of fp32 and a residual, or more; factors of rows take some.
  static constexpr int READ = registers_of<Epilogue::Inputs>();
  static constexpr int ROOM = PARTS * TILE_N < (DIVIDED ? 128 : 129) ? 96 : PARTS * TILE_N > (READ > 12 ? 192 : 256) ? 12 : 48;
  static constexpr int FITTING = ROOM / (READ > 12 ? READ : 12);
  static constexpr int AHEAD = FITTING >= PIECES ? PIECES : FITTING >= 4 && PIECES % 4 == 0 ? 4 : FITTING >= 2 && PIECES % 2 == 0 ? 2 : 1;
  u32 row;
  DEVICE RowLoad(const Params&, u32 row, u32) : row(row) {}
  DEVICE void operator()(const Params& p, u32 destination, u32 barrier, u32 step) {
    copy_shared_box<TILE_M, CLUSTER_N>(destination, p.map_a, barrier, column_of(step, 2), row);
  }
  DEVICE static u32 column_of_b(u32 step) { return column_of(step, 1); }
  DEVICE static u32 early(const Params& p) { return p.early; }
};
