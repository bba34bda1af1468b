// Emulates kernels/ptx/tma_outer.cuh. Rows of a box are 64 or 128 bytes, under the swizzle of the same name.
#pragma once
#include "ptx/tma.cuh"
inline void copy_box(u32 destination, const TensorMap& map, u32 barrier, u32 column, u32 row, u32 inner, u32 outer) {
  const u64 row_bytes = map.box_columns * map.element_bytes;
  if (row_bytes != 64 && row_bytes != 128) emulator::fail("only boxes of 64 and 128 bytes are emulated");
  if (destination % (8 * row_bytes)) emulator::fail("a box starts at a swizzle atom");
  for (u64 r = 0; r < map.box_rows; ++r)
    for (u64 c = 0; c < map.box_columns; ++c) {
      const u64 linear = destination + r * row_bytes + c * map.element_bytes, to = linear ^ (linear >> 7 & (row_bytes == 128 ? 7 : 3)) << 4;
      if (to + map.element_bytes > emulator::SHARED_BYTES) emulator::fail("a box lands outside shared memory");
      const u64 from_row = row + r, from_column = column + c;
      const bool inside = from_row < map.rows && from_column < map.columns && inner < map.outer_size[0] && outer < map.outer_size[1];
      const u64 from = map.address + from_row * map.row_bytes + from_column * map.element_bytes + inner * map.outer_bytes[0] + outer * map.outer_bytes[1];
      if (inside) memcpy(emulator::shared_memory + to, reinterpret_cast<const u8*>(from), map.element_bytes);
      else memset(emulator::shared_memory + to, 0, map.element_bytes);
    }
  auto& b = emulator::barrier_at(barrier);
  b.bytes -= static_cast<i32>(map.box_rows * row_bytes);
  emulator::settle(b);
}
