// The tensor memory accelerator: boxes of a tensor, described on the host, copied into swizzled shared memory.
#pragma once
#include "types.cuh"

struct alignas(64) TensorMap { u64 words[16]; };

DEVICE void prefetch_tensor_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// Box at (column, row) to `destination`; its bytes count towards `barrier`. What lies outside the tensor is zero.
DEVICE void copy_box(u32 destination, const TensorMap& map, u32 barrier, u32 column, u32 row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(column), "r"(row) : "memory");
}
