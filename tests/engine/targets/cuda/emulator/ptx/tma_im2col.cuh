// Emulates kernels/ptx/tma_im2col.cuh.
#pragma once
#include "ptx/tma.cuh"
EMULATED void copy_pixels(u32 destination, const TensorMap& map, u32 barrier, u32 channel, int x, int y, u32 image, u16 offset_x, u16 offset_y) {
  emulator::copy_pixels(destination, map, barrier, channel, {x, y, 0}, image, {offset_x, offset_y, 0}, 2, EMULATOR_HERE);
}
EMULATED void copy_pixels(u32 destination, const TensorMap& map, u32 barrier, u32 channel, int x, int y, int z, u32 image, u16 offset_x, u16 offset_y,
                        u16 offset_z) {
  emulator::copy_pixels(destination, map, barrier, channel, {x, y, z}, image, {offset_x, offset_y, offset_z}, 3, EMULATOR_HERE);
}
EMULATED void copy_pixels_to_blocks(u32 destination, const TensorMap& map, u32 barrier, u16 blocks, u32 channel, int x, int y, u32 image,
                                  u16 offset_x, u16 offset_y) {
  emulator::copy_pixels_to_blocks(destination, map, barrier, blocks, channel, {x, y, 0}, image, {offset_x, offset_y, 0}, 2, EMULATOR_HERE);
}
EMULATED void copy_pixels_to_blocks(u32 destination, const TensorMap& map, u32 barrier, u16 blocks, u32 channel, int x, int y, int z, u32 image,
                                  u16 offset_x, u16 offset_y, u16 offset_z) {
  emulator::copy_pixels_to_blocks(destination, map, barrier, blocks, channel, {x, y, z}, image, {offset_x, offset_y, offset_z}, 3, EMULATOR_HERE);
}
