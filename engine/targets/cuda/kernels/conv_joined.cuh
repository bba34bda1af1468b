// Convolution for sm_90a as conv_wgmma.cuh, by clusters of blocks that share the k of a tile (scheduler/joined_k.cuh).
#pragma once
#include "mma/patch_load.cuh"

extern "C" __global__ void __cluster_dims__(CLUSTER * CLUSTER_K, 1, 1) __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  run_pipeline<PatchLoad>(p);
}
