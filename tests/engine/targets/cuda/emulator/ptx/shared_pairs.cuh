// Emulates kernels/ptx/shared_pairs.cuh.
#pragma once
EMULATED uint2 load_shared_8(u32 address) {
  uint2 r;
  emulator::load_shared(&r, address, 8, EMULATOR_HERE);
  return r;
}
EMULATED float2 load_shared_8f(u32 address) {
  float2 r;
  emulator::load_shared(&r, address, 8, EMULATOR_HERE);
  return r;
}
