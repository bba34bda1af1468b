// Who touched what in shared memory, and whether anything orders it. Every access of a kernel comes here: g++ -fsanitize=thread calls
// __tsan_read4 and its like, which races.cpp has instead of the sanitizer's library.
//
// An agent is a thread of the cluster or the copy engine of one mbarrier. Each thread knows up to which time it has seen what every other
// agent did (a vector clock: Lamport 1978, Fidge 1988); barriers of the block, __syncwarp and mbarriers hand that on. Shuffles and
// matrix instructions do not: they order no memory. Two accesses to a byte, one of them a write, of which neither agent has seen the
// other's, are a race, unless the write leaves what was there.
#pragma once
#include "../runtime.h"

namespace emulator::races {

constexpr u32 ENGINES = 288;  // mbarriers a cluster may have

// Blocks of clusters have no static shared memory.
void begin_cluster(int blocks, int block_threads, u32 dynamic_bytes, unsigned char* static_begin, unsigned char* static_end);
// All threads of a block have ended; fails where another block's access to its shared memory, or a copy to it, may come later.
void block_ended(u32 rank);

// What hands knowledge on.
void block_synced(const bool* alive);  // where all threads are those of the block
void synced(int first, int count);     // as many threads from the first on
void numbered_arrived(u32 number);
void numbered_completed(u32 number);
void numbered_passed(u32 number);
void barrier_made(u32 barrier, const void* where);
void barrier_arrived(u32 barrier, const void* where);
void barrier_reached(u32 barrier, const void* where);  // by a copy from another block
void barrier_completed(u32 barrier);
void barrier_passed(u32 barrier, const void* where);

enum class Access { READ, WRITE, ATOMIC };
// The present thread touches bytes of shared memory; others are of no interest.
void touch(Access access, const void* p, u32 bytes, const void* where);
// Asynchronous work of the present thread, as far as it reads behind the fences of those who wrote: nobody may touch what it writes, or write what it reads, from here until it is `finished`.
void begin(Access access, const void* p, u32 bytes, const void* where);
void finish(Access access, const void* p, u32 bytes, const void* where);
// The copy engine writes for a barrier: seen by whoever passes the barrier's next completion.
void engine_writes(u32 barrier, const void* p, u32 bytes, const void* where);

// The present thread's writes so far are there for asynchronous reads.
void writes_fenced();

// The last write is done: called before anything else happens.
void settle();

}  // namespace emulator::races
