// Emulates kernels/ptx/tma.cuh. The 128 bytes of a map are those that emulator.py writes.
#pragma once
#include "ptx/barrier.cuh"
struct alignas(64) TensorMap { u64 address, element_bytes, columns, rows, row_bytes, box_columns, box_rows, tf32, outer_size[2], outer_bytes[2], unused[4]; };
inline void prefetch_tensor_map(const TensorMap&) {}
inline void copy_box(u32 destination, const TensorMap& map, u32 barrier, u32 column, u32 row) {
  if (destination % 1024) emulator::fail("a box needs a destination of 1024-byte alignment under the 128-byte swizzle");
  const u64 row_bytes = map.box_columns * map.element_bytes;
  if (row_bytes != 128) emulator::fail("only boxes of 128 bytes are emulated");
  for (u64 r = 0; r < map.box_rows; ++r)
    for (u64 c = 0; c < map.box_columns; ++c) {
      const i64 from_row = static_cast<i32>(row) + static_cast<i64>(r), from_column = static_cast<i32>(column) + static_cast<i64>(c);
      const u64 linear = destination + r * row_bytes + c * map.element_bytes, to = linear ^ (linear >> 7 & 7) << 4;
      if (to + map.element_bytes > emulator::SHARED_BYTES) emulator::fail("a box lands outside shared memory");
      u8* target = emulator::shared_memory + to;
      if (from_row < 0 || from_column < 0 || from_row >= static_cast<i64>(map.rows) || from_column >= static_cast<i64>(map.columns))
        memset(target, 0, map.element_bytes);
      else if (map.tf32)
        *reinterpret_cast<u32*>(target) = round_to_tf32(*reinterpret_cast<const float*>(map.address + from_row * map.row_bytes + from_column * 4));
      else
        memcpy(target, reinterpret_cast<const u8*>(map.address) + from_row * map.row_bytes + from_column * map.element_bytes, map.element_bytes);
    }
  auto& b = emulator::barrier_at(barrier);
  b.bytes -= static_cast<i32>(map.box_rows * row_bytes);
  emulator::settle(b);
}
