// The GPU's clock.
#pragma once
#include "types.cuh"

DEVICE u64 global_nanoseconds() { u64 t; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)); return t; }
