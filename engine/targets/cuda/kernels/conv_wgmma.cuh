// Convolution as an implicit matrix product for sm_90a: the pipeline of mma/wgmma_pipeline.cuh on gathered patches (mma/patch_load.cuh).
#pragma once
#include "mma/patch_load.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) { run_pipeline<PatchLoad>(p); }
