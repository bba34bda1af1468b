// Emulates kernels/ptx/barrier.cuh.
#pragma once
EMULATED void barrier_init(u32 barrier, u32 arrivals) { emulator::barrier_init(barrier, arrivals, EMULATOR_HERE); }
inline void barrier_init_fence() {}
EMULATED void barrier_arrive(u32 barrier) { emulator::barrier_arrive(barrier, EMULATOR_HERE); }
EMULATED void barrier_arrive_expect(u32 barrier, u32 bytes) { emulator::barrier_arrive_expect(barrier, bytes, EMULATOR_HERE); }
EMULATED void barrier_wait(u32 barrier, u32 parity) { emulator::barrier_wait(barrier, parity, EMULATOR_HERE); }
inline void shared_writes_fence() { emulator::shared_writes_fence(); }
template <int THREADS> void meet_at(u32 number) { emulator::meet_at(number, THREADS); }
template <int THREADS> void pass_by(u32 number) { emulator::pass_by(number, THREADS); }
template <int REGISTERS> void give_registers() {}
template <int REGISTERS> void take_registers() {}
