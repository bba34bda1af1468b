// Matrix product for sm_90a (mma/wgmma_pipeline.cuh) of operands that the copy engine can read as they lie.
#pragma once
#include "mma/row_load.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) { run_pipeline<RowLoad, OwnStores, ProductRows>(p); }
