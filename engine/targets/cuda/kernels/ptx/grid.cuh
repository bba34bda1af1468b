// Programmatic dependent launch: a kernel may start while the one before it drains. Every kernel waits before its first
// access to memory that another kernel writes, and before its first store; so a chain of them stays ordered.
#pragma once
#include "types.cuh"

DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
