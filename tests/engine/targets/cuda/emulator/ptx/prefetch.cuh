// Emulates kernels/ptx/prefetch.cuh: the address must be one that may be read.
#pragma once
inline void prefetch_l2(const void* address) {
  const volatile unsigned char* byte = static_cast<const unsigned char*>(address);
  (void)*byte;
}
inline void prefetch_l2_bytes(const void* address, u32 bytes) {
  if (reinterpret_cast<u64>(address) % 16 || bytes % 16 || !bytes) emulator::fail("a prefetch of bytes that are not whole sixteens");
  const volatile unsigned char* byte = static_cast<const unsigned char*>(address);
  (void)byte[0], (void)byte[bytes - 1];
}
