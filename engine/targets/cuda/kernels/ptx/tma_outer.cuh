// Boxes of a tensor of four axes: two that a box spans, and two outer ones of which it has one place.
#pragma once
#include "ptx/tma.cuh"

// As the copy of a box of two axes. Places are given from the innermost axis on.
DEVICE void copy_box(u32 destination, const TensorMap& map, u32 barrier, u32 column, u32 row, u32 inner, u32 outer) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(inner), "r"(outer) : "memory");
}
