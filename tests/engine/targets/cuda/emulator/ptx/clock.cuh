// Emulates kernels/ptx/clock.cuh: a clock that ticks when it is read.
#pragma once
inline u64 global_nanoseconds() { static u64 ticks = 1000; return ticks += 32; }
