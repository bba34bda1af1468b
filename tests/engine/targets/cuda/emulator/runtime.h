// What an emulated kernel calls: threads, barriers, shared memory by address, asynchronous work, matrix products. In front of every
// kernel's source and of runtime/*.cpp, which are compiled once. It includes nothing: a kernel then compiles in half the time.
#pragma once

namespace emulator {

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int MAX_THREADS = 3072, WARP = 32;
constexpr u32 SHARED_BYTES = 256 << 10, MAX_CLUSTER = 8;

struct Index { u32 x, y, z; };
extern Index thread, block, grid, block_size;
extern int current;  // the thread that runs, counted through all blocks of the cluster
// Of all blocks of the cluster, one after the other.
extern unsigned char shared_memory[MAX_CLUSTER * SHARED_BYTES];
u32 rank();  // the present thread's block's number in the cluster
inline unsigned char* own_shared_memory() { return shared_memory + rank() * SHARED_BYTES; }

[[noreturn]] void fail(const char* what);

void sync_block();
void meet_cluster();
void sync_warp();
void meet_at(u32 number, int expected);  // the numbered barriers: complete when so many threads have come, by either function
void pass_by(u32 number, int expected);
u64 exchange(u64 bits, int source);  // a shuffle: the bits that lane `source` of the warp brings

// Addresses are offsets in `shared_memory`; but for the functions that say so they lie in the block's own. `where` is the place in the kernel that a race is reported at.
void load_shared(void* to, u32 address, u32 bytes, const void* where);
void store_shared(u32 address, const void* from, u32 bytes, const void* where);
void load_matrices(u32 (&r)[4], u32 address, bool transposed, const void* where);
void store_matrices(u32 address, const u32 (&r)[4], const void* where);

// A copy takes effect when the thread waits for its group.
void copy_async(u32 destination, const void* source, u32 bytes, bool valid, const void* where);
void copy_async_commit();
void copy_async_wait(int pending);

void barrier_init(u32 barrier, u32 arrivals, const void* where);
void barrier_arrive(u32 barrier, const void* where);
void barrier_arrive_expect(u32 barrier, u32 bytes, const void* where);
void barrier_wait(u32 barrier, u32 parity, const void* where);

// What lies at `address` of a block's own shared memory in that of another of the cluster.
u32 address_in_cluster(u32 address, u32 rank);
void barrier_arrive_in_cluster(u32 barrier, const void* where);  // of any block of the cluster

// 16 bytes to any block of the cluster; they count towards a barrier of the same block.
void store_async(u32 address, const void* from, u32 barrier, const void* where);

// What this thread has written to shared memory is there for asynchronous work that is ordered behind it.
void shared_writes_fence();

// The 128 bytes that emulator.py writes. Sizes in elements.
struct alignas(64) Map { u64 address, element_bytes, columns, rows, row_bytes, box_columns, box_rows, tf32, outer_size[2], outer_bytes[2], unused[4]; };
// Rows of a box are 64 or 128 bytes, under the swizzle of the same name. Its bytes count towards `barrier`.
void copy_box(u32 destination, const Map& map, u32 barrier, u32 column, u32 row, u32 inner, u32 outer, const void* where);

// The same to the same place in every block whose bit of `blocks` is set.
void copy_box_to_blocks(u32 destination, const Map& map, u32 barrier, u32 column, u32 row, u32 blocks, const void* where);

// Elements of 16 bits. A box is read, and written to the tensor, when the thread waits for its group.
void store_box(u32 source, const Map& map, u32 column, u32 row, const void* where);
void store_box_commit();
void store_box_wait(int pending);

// The walk over pixels of ptx/tma_im2col.cuh; `axes` are spatial.
void copy_pixels(u32 destination, const Map& map, u32 barrier, u32 channel, const int (&start)[3], u32 image, const u32 (&offset)[3], u32 axes, const void* where);

enum class Element { HALF, BFLOAT16, E4M3, I8, TF32 };
// d (16×8) += a (16×32 bytes) · b: fragments of a warp.
void mma(Element element, float* d, const u32* a, u32 b0, u32 b1);

// d (64×N) += or = a · b: N / 2 results a thread (fp32; of I8 integers of 32 bits), 32 bytes of k, computed when the thread waits for
// the group.
void wgmma(Element element, int n, void* d, u64 a, u64 b, bool accumulate, const void* where);
void wgmma_across(Element element, int n, float* d, u64 a, u64 b, bool accumulate, const void* where);  // the rows of b are k
void wgmma_registers(Element element, int n, float* d, const u32* a, u64 b, bool accumulate, const void* where);
void wgmma_commit();
void wgmma_wait(int pending);

// An atomic access to memory that may be shared.
void access_atomically(const void* p, u32 bytes, const void* where);

}  // namespace emulator

// The place in the kernel of the code that stands here, once it is inlined.
#define EMULATOR_HERE ({ const void* here; asm volatile("lea (%%rip), %0" : "=r"(here)); here; })
#define EMULATED inline __attribute__((always_inline))
