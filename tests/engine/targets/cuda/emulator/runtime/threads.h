// What the parts of the runtime share.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "../runtime.h"

namespace emulator {

constexpr u32 NUMBERED = 16;          // barriers that the hardware numbers
constexpr size_t MESSAGE_BYTES = 512;  // emulator.py makes the room

void yield();          // to the other threads
void note_progress();  // a waiting thread may be able to go on
void meet_warp();      // waits for the warp, without ordering memory
void meet_warpgroup();
void forget_copies(int thread);
bool has_stores_under_way(int thread);
bool has_ended(u32 rank);  // a block of the cluster
u32 cluster_size();
void forget_products(int thread);

}  // namespace emulator
