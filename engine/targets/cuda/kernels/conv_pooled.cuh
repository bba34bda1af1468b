// Convolution for sm_90a as conv_wgmma.cuh, of whose results only the maxima over windows of 2 × 2 pixels are stored (mma/pooled_rows.cuh).
#pragma once
#include "mma/pooled_load.cuh"
#include "mma/pooled_rows.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) { run_pipeline<PooledLoad, PooledStores>(p); }
