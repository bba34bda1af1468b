// Emulates kernels/ptx/memory.cuh. An asynchronous copy happens when it is waited for.
#pragma once
inline u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }
inline void check_shared(u32 address, u32 bytes) {
  if (address + bytes > emulator::SHARED_BYTES || address % bytes) emulator::fail("misaligned or wild shared memory access");
}
template <u32 BYTES> void copy_async(u32 destination, const void* source, bool valid) {
  check_shared(destination, BYTES);
  if (valid && reinterpret_cast<uintptr_t>(source) % BYTES) emulator::fail("cp.async from a misaligned address");
  emulator::fibers[emulator::current].open_copies.push_back([=] {
    if (valid) memcpy(emulator::shared_memory + destination, source, BYTES);
    else memset(emulator::shared_memory + destination, 0, BYTES);
  });
}
inline void copy_async_16(u32 destination, const void* source, bool valid) { copy_async<16>(destination, source, valid); }
inline void copy_async_4(u32 destination, const void* source, bool valid) { copy_async<4>(destination, source, valid); }
inline void copy_async_commit() {
  auto& fiber = emulator::fibers[emulator::current];
  fiber.copies.push_back(std::move(fiber.open_copies));
  fiber.open_copies.clear();
}
template <int PENDING> void copy_async_wait() { emulator::run_groups(emulator::fibers[emulator::current].copies, PENDING); }
inline u32 load_shared_4(u32 address) {
  check_shared(address, 4);
  u32 r;
  memcpy(&r, emulator::shared_memory + address, 4);
  return r;
}
inline uint4 load_shared_16(u32 address) {
  check_shared(address, 16);
  uint4 r;
  memcpy(&r, emulator::shared_memory + address, 16);
  return r;
}
inline void store_shared_4(u32 address, u32 v) {
  check_shared(address, 4);
  memcpy(emulator::shared_memory + address, &v, 4);
}
inline void store_shared_16(u32 address, uint4 v) {
  check_shared(address, 16);
  memcpy(emulator::shared_memory + address, &v, 16);
}
// Lane l gives the address of row l % 8 of matrix l / 8; it gets elements 2 (l % 4) and the next of row l / 4.
inline void load_matrices(u32 (&r)[4], u32 address, bool transposed) {
  check_shared(address, 16);
  const int warp = emulator::current / 32, lane = emulator::current % 32;
  emulator::exchange[warp][lane] = address;
  emulator::meet_warp();
  for (int i = 0; i < 4; ++i) {
    u16 pair[2];
    for (int j = 0; j < 2; ++j) {
      const int row = transposed ? lane % 4 * 2 + j : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + j;
      memcpy(&pair[j], emulator::shared_memory + emulator::exchange[warp][8 * i + row] + 2 * column, 2);
    }
    memcpy(&r[i], pair, 4);
  }
  emulator::meet_warp();
}
inline void load_matrix_x4(u32 (&r)[4], u32 address) { load_matrices(r, address, false); }
inline void load_matrix_x4_transposed(u32 (&r)[4], u32 address) { load_matrices(r, address, true); }
inline void store_global_16(float* p, float4 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulator::fail("a vector store to a misaligned address");
  memcpy(p, &v, 16);
}
inline float4 load_global_16(const float* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emulator::fail("a vector load from a misaligned address");
  float4 v;
  memcpy(&v, p, 16);
  return v;
}
inline void fence_gpu() {}
