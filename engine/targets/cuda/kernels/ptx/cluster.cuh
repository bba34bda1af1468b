// Clusters of blocks that run side by side and reach each other's shared memory. sm_90 on. The size of a cluster is fixed when a kernel
// is compiled (`__cluster_dims__`).
#pragma once
#include "ptx/tma.cuh"

// This block's number in its cluster.
DEVICE u32 cluster_rank() { u32 r; asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r)); return r; }
// All threads of all blocks of the cluster. Of memory it orders initialised barriers only, behind `barrier_init_fence`: the form that
// orders all compiles to a fence for the whole GPU.
DEVICE void meet_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory"); }
// What lies at this block's `address` in block `rank`: for `barrier_arrive_in_cluster`.
DEVICE u32 address_in_cluster(u32 address, u32 rank) {
  u32 r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(rank));
  return r;
}
DEVICE void barrier_arrive_in_cluster(u32 barrier) { asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory"); }
// 16 bytes to an address in the cluster, past this block's own memory operations: they count towards the barrier, which lies in the same
// block as the address, and are there for whoever has waited for its phase.
DEVICE void store_async_in_cluster(u32 address, float4 v, u32 barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
               ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier) : "memory");
}
// As `copy_box`, to the same place in every block of the cluster whose bit of `blocks` is set; the bytes count towards the barrier at
// the same place in each.
DEVICE void copy_box_to_blocks(u32 destination, const TensorMap& map, u32 barrier, u32 column, u32 row, u16 blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(blocks) : "memory");
}
