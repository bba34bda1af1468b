// Emulates kernels/ptx/tma_im2col.cuh, after the PTX manual's description of the im2col mode. The 128 bytes of a map are those that
// emulator.py writes.
#pragma once
#include "ptx/tma.cuh"
namespace emulator {
struct PixelMap {
  u64 address;
  u32 channels, size[3], images;
  u64 stride[3], image_stride;
  i16 lower[3], upper[3], step[3];  // x first
  u8 tf32;
  u32 element_bytes, box_channels, box_pixels, axes;
};
static_assert(sizeof(PixelMap) <= sizeof(TensorMap), "");

inline void copy_pixels(u32 destination, const TensorMap& packed, u32 barrier, u32 channel, const int (&start)[3], u32 image, const u32 (&offset)[3], u32 axes) {
  PixelMap map;
  memcpy(&map, &packed, sizeof map);
  if (map.axes != axes) fail("the copy has other axes than the map");
  const u32 row_bytes = map.box_channels * map.element_bytes;
  if (destination % (8 * row_bytes)) fail("a box starts at a swizzle atom");
  i64 at[3], last[3];
  for (u32 i = 0; i < 3; ++i) {
    if (offset[i] > (axes == 2 ? 255u : 31u)) fail("an offset has more bits than the copy takes");
    at[i] = start[i];
    last[i] = static_cast<i64>(map.size[i]) - 1 + map.upper[i];
    if (at[i] < map.lower[i] || at[i] > last[i]) fail("a walk begins outside its bounding box");
    if ((at[i] - map.lower[i]) % map.step[i]) fail("a walk begins between its steps");
  }
  i64 n = image;
  for (u32 pixel = 0; pixel < map.box_pixels; ++pixel) {
    bool inside = n < map.images;
    u64 from = map.address + n * map.image_stride;
    for (u32 i = 0; i < 3; ++i) {
      const i64 place = at[i] + offset[i];
      inside = inside && place >= 0 && place < static_cast<i64>(map.size[i]);
      from += place * map.stride[i];
    }
    for (u32 c = 0; c < map.box_channels; ++c) {
      const u32 linear = destination + pixel * row_bytes + c * map.element_bytes, to = linear ^ (linear >> 7 & (row_bytes / 16 - 1)) << 4;
      if (to + map.element_bytes > SHARED_BYTES) fail("a box lands outside shared memory");
      u8* target = shared_memory + to;
      const u8* source = reinterpret_cast<const u8*>(from) + (static_cast<u64>(channel) + c) * map.element_bytes;
      if (!inside || channel + c >= map.channels) memset(target, 0, map.element_bytes);
      else if (map.tf32) *reinterpret_cast<u32*>(target) = round_to_tf32(*reinterpret_cast<const float*>(source));
      else memcpy(target, source, map.element_bytes);
    }
    // On to the next pixel of the box: along x, then y, then z, then the next image.
    u32 axis = 0;
    while (axis < 3 && (at[axis] += map.step[axis]) > last[axis]) {
      at[axis] = map.lower[axis];
      ++axis;
    }
    if (axis == 3) ++n;
  }
  auto& b = barrier_at(barrier);
  b.bytes -= static_cast<i32>(map.box_pixels * row_bytes);
  settle(b);
}
}  // namespace emulator
inline void copy_pixels(u32 destination, const TensorMap& map, u32 barrier, u32 channel, int x, int y, u32 image, u16 offset_x, u16 offset_y) {
  emulator::copy_pixels(destination, map, barrier, channel, {x, y, 0}, image, {offset_x, offset_y, 0}, 2);
}
inline void copy_pixels(u32 destination, const TensorMap& map, u32 barrier, u32 channel, int x, int y, int z, u32 image, u16 offset_x, u16 offset_y,
                        u16 offset_z) {
  emulator::copy_pixels(destination, map, barrier, channel, {x, y, z}, image, {offset_x, offset_y, offset_z}, 3);
}
