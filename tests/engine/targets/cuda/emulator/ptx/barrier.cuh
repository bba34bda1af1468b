// Emulates kernels/ptx/barrier.cuh: an mbarrier's 64 bits hold its phase and what the phase still waits for.
#pragma once
namespace emulator {
struct Barrier { u32 pending : 15, expected : 15, phase : 1, valid : 1; i32 bytes; };
inline Barrier& barrier_at(u32 address) {
  if (address % 8 || address + 8 > SHARED_BYTES) fail("misaligned or wild barrier");
  return *reinterpret_cast<Barrier*>(shared_memory + address);
}
inline void settle(Barrier& b) {
  if (b.pending == 0 && b.bytes == 0) {
    b.phase ^= 1;
    b.pending = b.expected;
    ++progress;
  }
}
}  // namespace emulator
inline void barrier_init(u32 barrier, u32 arrivals) { emulator::barrier_at(barrier) = {arrivals, arrivals, 0, 1, 0}; }
inline void barrier_init_fence() {}
inline void barrier_arrive(u32 barrier) {
  auto& b = emulator::barrier_at(barrier);
  if (b.pending == 0) emulator::fail("more arrivals at a barrier than it was initialised for");
  b.pending = b.pending - 1;
  emulator::settle(b);
}
inline void barrier_arrive_expect(u32 barrier, u32 bytes) {
  emulator::barrier_at(barrier).bytes += static_cast<i32>(bytes);
  barrier_arrive(barrier);
}
inline void barrier_wait(u32 barrier, u32 parity) {
  while (emulator::barrier_at(barrier).phase == parity) emulator::yield();
}
template <int THREADS> void meet_at(u32 number) { emulator::meet(emulator::named_meetings[number], [] { return THREADS; }); }
template <int THREADS> void pass_by(u32 number) {
  auto& meeting = emulator::named_meetings[number];
  if (++meeting.arrived >= THREADS) meeting = {0, meeting.generation + 1};
  ++emulator::progress;
}
template <int REGISTERS> void give_registers() {}
template <int REGISTERS> void take_registers() {}
