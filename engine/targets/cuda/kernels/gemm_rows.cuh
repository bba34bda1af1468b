// Matrix product of up to 16 rows (mma/few_rows.cuh).
#pragma once
#include "mma/few_rows.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  multiply_rows(p);
}
