// Matrix product for sm_90a as gemm_wgmma.cuh, for results of 16 bits whose rows are not aligned (mma/ragged_stores.cuh).
#pragma once
#include "mma/ragged_stores.cuh"
#include "mma/row_load.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) { run_pipeline<RowLoad, RaggedStores, ProductRows>(p); }
