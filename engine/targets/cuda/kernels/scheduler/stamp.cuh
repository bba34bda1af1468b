// The stamp slot every kernel carries: when its first block started and its last ended, by the GPU's nanosecond clock.
// The slot is null when nobody measures; it is filled with ones before a launch, so both words are minima (the end is
// stored as its complement).
#pragma once
#include "ptx/clock.cuh"

struct Stamp { u64 begin; u64 end_complement; };

DEVICE void stamp_begin(Stamp* stamp) {
  if (stamp != nullptr && threadIdx.x == 0) atomicMin(&stamp->begin, global_nanoseconds());
}
// `mine`: whether this thread says when the block ended. Where its warps end at different times, one of each does.
DEVICE void stamp_end(Stamp* stamp, bool mine = threadIdx.x == 0) {
  if (stamp != nullptr && mine) atomicMin(&stamp->end_complement, ~global_nanoseconds());
}
