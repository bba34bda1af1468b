// Two blocks of the pipeline on wgmma (mma/wgmma_pipeline.cuh) that form a cluster. Their tiles are neighbours, along m (CLUSTER_M 2) or
// along n (CLUSTER_N 2), so that one operand's tile is the same for both: each loads half of it (of gathered patches half of every panel,
// mma/patch_load.cuh) and has the copy engine deliver that to both. The L2 cache then has to deliver a third less for a tile of 128 × 256.
//
// Both blocks take the same steps in the same order. A stage is filled anew when the consumers of both have read it, since either
// producer writes to both; a tile wholly outside the result (the neighbour of the last) is loaded, as zeros, and multiplied like any.
// No block ends before all arrivals at its barriers have come: its producer waits for them. By then its own consumers have seen all that
// was sent to it.
// Or the blocks of a cluster, CLUSTER_K of them, share the k of a tile (scheduler/joined_k.cuh): then each loads what it multiplies. Or
// CLUSTER_K pairs do, each as above, with a part of k; then the blocks of a pair are neighbours in their cluster.
// config: cluster_m, cluster_n, cluster_k; band, the rows of clusters that are taken column by column.
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "scheduler/tiles.cuh"

constexpr int CLUSTER_M = config::cluster_m, CLUSTER_N = config::cluster_n, CLUSTER = CLUSTER_M * CLUSTER_N;
constexpr int CLUSTER_K = config::cluster_k;
static_assert(CLUSTER <= 2, "");

// This block's number among those that share an operand, and the part of k that these have.
DEVICE u32 rank_of_sharer() { return CLUSTER_K > 1 ? cluster_rank() % CLUSTER : cluster_rank(); }
DEVICE u32 rank_of_part() { return cluster_rank() / CLUSTER; }
// The blocks of the cluster, as bits, that share an operand with this one.
template <int SHARERS> DEVICE u16 all_sharers() { return ((1 << SHARERS) - 1) << (CLUSTER_K > 1 ? rank_of_part() * CLUSTER : 0); }

// What a block takes in turn, counted in tiles of its cluster: where CLUSTER is 1, in tiles.
DEVICE u32 first_turn() { return blockIdx.x / (CLUSTER * CLUSTER_K); }
DEVICE u32 turns() { return gridDim.x / (CLUSTER * CLUSTER_K); }
// This block's tile of the cluster's tile `index`, of so many along m and n.
DEVICE TileIndex own_tile(u32 index, u32 clusters_m, u32 clusters_n) {
  TileIndex tile = tile_of<config::band>(index, clusters_m, clusters_n);
  if constexpr (CLUSTER_M > 1) tile.m = CLUSTER_M * tile.m + rank_of_sharer();
  if constexpr (CLUSTER_N > 1) tile.n = CLUSTER_N * tile.n + rank_of_sharer();
  return tile;
}

// Brings ROWS rows of 128 bytes, from `row` on, that SHARERS blocks want: each copies its part of them to all.
template <int ROWS, int SHARERS> DEVICE void copy_shared_box(u32 destination, const TensorMap& map, u32 barrier, u32 column, u32 row) {
  if constexpr (SHARERS == 1) {
    copy_box(destination, map, barrier, column, row);
  } else {
    constexpr u32 PART = ROWS / SHARERS;
    static_assert(ROWS % SHARERS == 0 && PART % 8 == 0, "parts start at a swizzle atom");
    const u32 first = rank_of_sharer() * PART;
    copy_box_to_blocks(destination + first * 128, map, barrier, column, row + first, all_sharers<SHARERS>());
  }
}

// Barriers are initialised: go on when they are in the whole cluster.
DEVICE void start_together() {
  if constexpr (CLUSTER * CLUSTER_K > 1) meet_cluster();
  else __syncthreads();
}

// The barriers at which this block's consumers say that they have read a stage: its own, and its neighbour's.
struct EmptyBarriers {
  u32 own, neighbour;
  DEVICE explicit EmptyBarriers(u32 first) : own(first), neighbour(first) {
    if constexpr (CLUSTER > 1) neighbour = address_in_cluster(first, cluster_rank() ^ 1);
  }
  DEVICE void arrive(u32 stage) const {
    barrier_arrive(own + 8 * stage);
    if constexpr (CLUSTER > 1) barrier_arrive_in_cluster(neighbour + 8 * stage);
  }
};

// By the producer, which would fill `stage` next: until every stage has been read for the last time, here and next door.
template <int STAGES> DEVICE void wait_for_readers(u32 empty, u32 stage, u32 parity) {
  if constexpr (CLUSTER > 1) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_wait(empty + 8 * stage, parity);
      if (++stage == STAGES) { stage = 0; parity ^= 1; }
    }
  }
}
