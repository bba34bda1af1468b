// Matrix product of up to 16 rows for sm_90a, by clusters of blocks that share the k of some columns (mma/few_rows.cuh).
#pragma once
#include "mma/few_rows.cuh"

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  multiply_rows(p);
}
