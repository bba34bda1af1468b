// Emulates kernels/ptx/memory.cuh.
#pragma once
inline u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }
EMULATED void copy_async_16(u32 destination, const void* source, bool valid) { emulator::copy_async(destination, source, 16, valid, EMULATOR_HERE); }
EMULATED void copy_async_16_ahead(u32 destination, const void* source, bool valid) { emulator::copy_async(destination, source, 16, valid, EMULATOR_HERE); }
EMULATED void copy_async_4(u32 destination, const void* source, bool valid) { emulator::copy_async(destination, source, 4, valid, EMULATOR_HERE); }
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int PENDING> void copy_async_wait() { emulator::copy_async_wait(PENDING); }
EMULATED u32 load_shared_4(u32 address) {
  u32 r;
  emulator::load_shared(&r, address, 4, EMULATOR_HERE);
  return r;
}
EMULATED uint4 load_shared_16(u32 address) {
  uint4 r;
  emulator::load_shared(&r, address, 16, EMULATOR_HERE);
  return r;
}
EMULATED void store_shared_2(u32 address, u16 v) { emulator::store_shared(address, &v, 2, EMULATOR_HERE); }
EMULATED void store_shared_4(u32 address, u32 v) { emulator::store_shared(address, &v, 4, EMULATOR_HERE); }
EMULATED void store_shared_16(u32 address, uint4 v) { emulator::store_shared(address, &v, 16, EMULATOR_HERE); }
EMULATED void store_shared_16(u32 address, float4 v) { emulator::store_shared(address, &v, 16, EMULATOR_HERE); }
EMULATED void load_matrix_x4(u32 (&r)[4], u32 address) { emulator::load_matrices(r, address, false, EMULATOR_HERE); }
EMULATED void load_matrix_x4_transposed(u32 (&r)[4], u32 address) { emulator::load_matrices(r, address, true, EMULATOR_HERE); }
inline void store_global_16(float* p, float4 v) {
  if (reinterpret_cast<u64>(p) % 16) emulator::fail("a vector store to a misaligned address");
  *reinterpret_cast<float4*>(p) = v;
}
inline void store_global_16_if(bool condition, void* p, uint4 v) {
  if (condition && reinterpret_cast<u64>(p) % 16) emulator::fail("a vector store to a misaligned address");
  if (condition) *reinterpret_cast<uint4*>(p) = v;
}
inline void store_global_8_if(bool condition, u32* p, u32 v, u32 w) {
  if (condition && reinterpret_cast<u64>(p) % 8) emulator::fail("a vector store to a misaligned address");
  if (condition) p[0] = v, p[1] = w;
}
inline void store_global_4_if(bool condition, u32* p, u32 v) {
  if (condition && reinterpret_cast<u64>(p) % 4) emulator::fail("a store to a misaligned address");
  if (condition) *p = v;
}
inline void store_global_2_if(bool condition, u16* p, u16 v) {
  if (condition) *p = v;
}
inline float4 load_global_16(const float* p) {
  if (reinterpret_cast<u64>(p) % 16) emulator::fail("a vector load from a misaligned address");
  return *reinterpret_cast<const float4*>(p);
}
inline float2 load_global_8(const float2* p) {
  if (reinterpret_cast<u64>(p) % 8) emulator::fail("a vector load from a misaligned address");
  return *p;
}
inline void fence_gpu() {}
