// Persistent blocks that take their next item of work from a counter, so that one with short items takes more of them. A pair of
// counters belongs to one launch, because launches may overlap: `counters[0]` is how many items were taken beside each block's first,
// `counters[1]` how many blocks have found nothing more. Both are zero before the first run; the last block leaves them so.
#pragma once
#include "ptx/memory.cuh"

// What follows item `index`. Asked early, the answer comes while the item is still worked on. A block's first item is its own number.
template <bool DYNAMIC, class P> DEVICE u32 item_after(const P& p, u32 index) {
  if constexpr (DYNAMIC) return gridDim.x + atomicAdd(p.counters, 1u);
  else return index + gridDim.x;
}

// Called once by a block, behind its last `item_after`.
template <bool DYNAMIC, class P> DEVICE void no_more_items(const P& p) {
  if constexpr (DYNAMIC) {
    fence_gpu();  // what this block took comes before it is counted
    if (atomicAdd(p.counters + 1, 1u) == gridDim.x - 1) {
      fence_gpu();  // nor is anything of the others behind the reset
      p.counters[0] = 0;
      p.counters[1] = 0;
    }
  }
}
