// Matrix product for sm_90a as gemm_wgmma.cuh, whose results pass through shared memory to the copy engine, and full-tile operands of
// the epilogue the other way (mma/staging.cuh).
#pragma once
#include "mma/row_load.cuh"
#include "mma/staging.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) { run_pipeline<RowLoad, StagedStores, ProductRows>(p); }
