// What the blocks of a cluster add up of a product of few rows (mma/few_rows.cuh): each sends its sums to the first of them, straight into
// that one's shared memory, which adds them in the order of the blocks, so that a result has the same bits in every run. Through global
// memory (scheduler/split_k.cuh) the same takes 2 to 3 µs, a fifth of a product of 16 million weights.
// A thread below THREADS has eight sums. Without a cluster nothing of this is left.
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/memory.cuh"

template <int BLOCKS, int THREADS> struct ClusterSums {
  static constexpr u32 HALF = THREADS * 16, FROM_BLOCK = 2 * HALF;                // of four sums each
  static constexpr u32 BYTES = (BLOCKS - 1) * FROM_BLOCK + 16;  // what the others send, and a barrier
  u32 region, rank;

  // Before the first sums, by all threads of all blocks: none sends before the first block is there, and its barrier.
  DEVICE void begin() const {
    if (threadIdx.x == 0) {
      barrier_init(landed(), 1);
      barrier_init_fence();
      if (rank == 0) barrier_arrive_expect(landed(), (BLOCKS - 1) * FROM_BLOCK);
    }
    meet_cluster();
  }
  // By whole warps. True in the first block, whose `v` are then the sums of all.
  DEVICE bool add(float (&v)[8]) const {
    const bool has = threadIdx.x < THREADS;
    const u32 place = region + 16 * threadIdx.x;
    if (rank != 0) {
      const u32 there = address_in_cluster(place + (rank - 1) * FROM_BLOCK, 0), barrier = address_in_cluster(landed(), 0);
      if (has) {
        store_async_in_cluster(there, make_float4(v[0], v[1], v[2], v[3]), barrier);
        store_async_in_cluster(there + HALF, make_float4(v[4], v[5], v[6], v[7]), barrier);
      }
      return false;
    }
    barrier_wait(landed(), 0);
#pragma unroll
    for (int block = 0; block < BLOCKS - 1; ++block) {
      if (!has) continue;
      const uint4 left = load_shared_16(place + block * FROM_BLOCK), right = load_shared_16(place + block * FROM_BLOCK + HALF);
      v[0] += __uint_as_float(left.x), v[1] += __uint_as_float(left.y), v[2] += __uint_as_float(left.z), v[3] += __uint_as_float(left.w);
      v[4] += __uint_as_float(right.x), v[5] += __uint_as_float(right.y), v[6] += __uint_as_float(right.z), v[7] += __uint_as_float(right.w);
    }
    return true;
  }

 private:
  DEVICE u32 landed() const { return region + (BLOCKS - 1) * FROM_BLOCK; }
};

template <int THREADS> struct ClusterSums<1, THREADS> {
  static constexpr u32 BYTES = 0;
  u32 region, rank;
  DEVICE void begin() const {}
  DEVICE bool add(float (&)[8]) const { return true; }
};
