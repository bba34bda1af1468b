// Convolution for sm_90a as conv_pooled.cuh, by blocks in pairs that share an operand's tile (mma/cluster.cuh).
#pragma once
#include "mma/pooled_load.cuh"
#include "mma/pooled_rows.cuh"

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  run_pipeline<PooledLoad, PooledStores>(p);
}
