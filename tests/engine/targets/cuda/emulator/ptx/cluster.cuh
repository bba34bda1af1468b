// Emulates kernels/ptx/cluster.cuh.
#pragma once
#include "ptx/tma.cuh"
inline u32 cluster_rank() { return emulator::rank(); }
inline void meet_cluster() { emulator::meet_cluster(); }
inline u32 address_in_cluster(u32 address, u32 rank) { return emulator::address_in_cluster(address, rank); }
EMULATED void barrier_arrive_in_cluster(u32 barrier) { emulator::barrier_arrive_in_cluster(barrier, EMULATOR_HERE); }
EMULATED void store_async_in_cluster(u32 address, float4 v, u32 barrier) { emulator::store_async(address, &v, barrier, EMULATOR_HERE); }
EMULATED void copy_box_to_blocks(u32 destination, const TensorMap& map, u32 barrier, u32 column, u32 row, u16 blocks) {
  emulator::copy_box_to_blocks(destination, map, barrier, column, row, blocks, EMULATOR_HERE);
}
