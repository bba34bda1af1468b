// The tensor memory accelerator's walk over the pixels of an image, as the implicit product of a convolution wants them.
#pragma once
#include "ptx/tma.cuh"

// Pixels to `destination`, the map's channels from `channel` on of each; their bytes count towards `barrier`. The first is that of
// an image at (x, y), the others follow it in the order of the map's bounding box: along x, along y, from image to image. All are
// moved by the offsets. What lies outside the tensor is zero.
DEVICE void copy_pixels(u32 destination, const TensorMap& map, u32 barrier, u32 channel, int x, int y, u32 image, u16 offset_x, u16 offset_y) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(channel), "r"(x), "r"(y), "r"(image), "h"(offset_x), "h"(offset_y) : "memory");
}
// The same in volumes.
DEVICE void copy_pixels(u32 destination, const TensorMap& map, u32 barrier, u32 channel, int x, int y, int z, u32 image, u16 offset_x, u16 offset_y,
                        u16 offset_z) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2], {%8, %9, %10};"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(channel), "r"(x), "r"(y), "r"(z), "r"(image), "h"(offset_x), "h"(offset_y), "h"(offset_z)
      : "memory");
}
// As `copy_pixels`, to the same place in every block of the cluster whose bit of `blocks` is set; the bytes count towards the barrier at
// the same place in each.
DEVICE void copy_pixels_to_blocks(u32 destination, const TensorMap& map, u32 barrier, u16 blocks, u32 channel, int x, int y, u32 image,
                                  u16 offset_x, u16 offset_y) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], "
      "{%7, %8}, %9;"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(channel), "r"(x), "r"(y), "r"(image), "h"(offset_x), "h"(offset_y), "h"(blocks)
      : "memory");
}
DEVICE void copy_pixels_to_blocks(u32 destination, const TensorMap& map, u32 barrier, u16 blocks, u32 channel, int x, int y, int z, u32 image,
                                  u16 offset_x, u16 offset_y, u16 offset_z) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2], {%8, %9, %10}, %11;"
      ::"r"(destination), "l"(&map), "r"(barrier), "r"(channel), "r"(x), "r"(y), "r"(z), "r"(image), "h"(offset_x), "h"(offset_y), "h"(offset_z),
        "h"(blocks)
      : "memory");
}
