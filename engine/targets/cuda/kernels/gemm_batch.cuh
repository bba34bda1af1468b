// Products of several matrices for sm_90a (mma/wgmma_pipeline.cuh), which the copy engine can read as they lie (mma/batch_load.cuh). The
// rows of the results follow each other, from matrix to matrix.
#pragma once
#include "mma/batch_load.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) { run_pipeline<BatchLoad>(p); }
