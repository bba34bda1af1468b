// The tensor memory accelerator's way back: boxes of swizzled shared memory to a tensor. What lies outside the tensor is left out.
// Ordinary stores to a box need `shared_writes_fence` in the threads that made them, before the barrier behind which it is sent.
#pragma once
#include "ptx/tma.cuh"

// Box at (column, row) from `source`; part of this thread's group of stores that is not yet closed.
DEVICE void store_box(const TensorMap& map, u32 source, u32 column, u32 row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(&map), "r"(source), "r"(column), "r"(row) : "memory");
}
DEVICE void store_box_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory has been read of all but the last PENDING groups of this thread.
template <int PENDING> DEVICE void store_box_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory"); }
// Until all of this thread's groups are in global memory.
DEVICE void store_box_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
