// Matrix product for sm_90a as gemm_staged.cuh, by blocks in pairs that share an operand's tile (mma/cluster.cuh).
#pragma once
#include "mma/row_load.cuh"
#include "mma/staging.cuh"

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  run_pipeline<RowLoad, StagedStores, ProductRows>(p);
}
