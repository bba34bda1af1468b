// Copies between global memory, shared memory and registers: one instruction a function.
#pragma once
#include "types.cuh"

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

// 16 bytes from global to shared memory without passing through registers; where `valid` is false the 16 bytes become zero
// and `source` is not read.
DEVICE void copy_async_16(u32 destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0) : "memory");
}
// The same where the 256 bytes around it will be asked for soon: they come to the L2 cache.
DEVICE void copy_async_16_ahead(u32 destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0) : "memory");
}
// The same for 4 bytes.
DEVICE void copy_async_4(u32 destination, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source), "r"(valid ? 4 : 0) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

DEVICE u32 load_shared_4(u32 address) {
  u32 r;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(address) : "memory");
  return r;
}
DEVICE uint4 load_shared_16(u32 address) {
  uint4 r;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(address) : "memory");
  return r;
}
DEVICE void store_shared_2(u32 address, u16 v) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(v) : "memory"); }
DEVICE void store_shared_4(u32 address, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory"); }
DEVICE void store_shared_16(u32 address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

DEVICE void store_shared_16(u32 address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}

// Four 8×8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrix_x4(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
DEVICE void load_matrix_x4_transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// 16 bytes of global memory that other multiprocessors read or have written: past the first-level cache.
DEVICE void store_global_16(float* p, float4 v) {
  asm volatile("st.global.cg.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
DEVICE float4 load_global_16(const float* p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
// The same for 8 bytes.
DEVICE float2 load_global_8(const float2* p) {
  float2 v;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory");
  return v;
}
// 16 bytes, two words, a word, or half of one, where `condition` holds; without a branch, so that stores before and behind stay side by side.
// NOTES: of a plain copy of 16 bytes ptxas 13.0 makes four where the registers do not follow each other.
DEVICE void store_global_16_if(bool condition, void* p, uint4 v) {
  asm volatile("{.reg .pred c; setp.ne.u32 c, %0, 0; @c st.global.v4.u32 [%1], {%2, %3, %4, %5};}"
               ::"r"(static_cast<u32>(condition)), "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE void store_global_8_if(bool condition, u32* p, u32 v, u32 w) {
  asm volatile("{.reg .pred c; setp.ne.u32 c, %0, 0; @c st.global.v2.u32 [%1], {%2, %3};}"
               ::"r"(static_cast<u32>(condition)), "l"(p), "r"(v), "r"(w) : "memory");
}
DEVICE void store_global_4_if(bool condition, u32* p, u32 v) {
  asm volatile("{.reg .pred c; setp.ne.u32 c, %0, 0; @c st.global.u32 [%1], %2;}" ::"r"(static_cast<u32>(condition)), "l"(p), "r"(v) : "memory");
}
DEVICE void store_global_2_if(bool condition, u16* p, u16 v) {
  asm volatile("{.reg .pred c; setp.ne.u32 c, %0, 0; @c st.global.u16 [%1], %2;}" ::"r"(static_cast<u32>(condition)), "l"(p), "h"(v) : "memory");
}
// What this thread has written, or has seen written, is visible to the GPU before what it does next. Weaker than
// __threadfence, which also puts the fences of all threads in one order.
DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
