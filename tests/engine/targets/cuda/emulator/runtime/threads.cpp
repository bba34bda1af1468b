// Threads of a block as fibers, barriers, and the run of a grid.
//
// Clusters run one after the other, the blocks of one side by side. A fiber runs until it has to wait, in one of two orders, from the
// first thread on or from the last: a result that depends on which thread comes first differs. Beside that some may be late: a warp, a
// warpgroup or a block gets no turn until nobody else can go on; then it is another's turn to be late.
#include "threads.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "races.h"

namespace emulator {

Index thread, block, grid, block_size;
int current;
alignas(1024) unsigned char shared_memory[MAX_CLUSTER * SHARED_BYTES];

namespace {

constexpr int WARPGROUP = 4 * WARP;
constexpr int STACK_BYTES = 256 << 10;
struct Fiber {
  void* stack_pointer;
  unsigned char* stack;
};
struct Meeting { int arrived; unsigned generation; };

Fiber fibers[MAX_THREADS];
bool living[MAX_THREADS];
int threads, alive;  // of all blocks of the cluster
int block_threads, alive_in_block[MAX_CLUSTER];
u32 cluster;
Index first_block;  // of the cluster
bool last_first;    // the order in which threads take their turns
u32 lateness;       // not 0: some are late
u64 progress;     // counts what may free a waiting thread
void* scheduler_stack;
Meeting cluster_meeting, block_meetings[MAX_CLUSTER], warp_meetings[MAX_THREADS / WARP], warpgroup_meetings[MAX_THREADS / WARPGROUP], numbered_meetings[MAX_CLUSTER * NUMBERED];
u64 exchanged[MAX_THREADS / WARP][WARP];
void (*run_kernel)(const void*);
const void* parameters;
char* message;

// Saves the callee's registers and the stack pointer, and goes on where `to` was saved.
asm(R"(
.text
.local emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void emulator_switch(void** from, void* to);

// Returns when `expected` threads have come, after `joined` was called once. `expected` is asked anew: threads that end no longer
// take part.
template <class COUNT, class JOINED> void meet(Meeting& meeting, COUNT expected, JOINED joined) {
  const unsigned generation = meeting.generation;
  ++meeting.arrived;
  ++progress;
  while (meeting.generation == generation) {
    if (meeting.arrived >= expected()) {
      joined();
      meeting.arrived = 0;
      ++meeting.generation;
      ++progress;
      break;
    }
    yield();
  }
}
int first_of_warp() { return current / WARP * WARP; }
int lanes() { return std::min(WARP, threads - first_of_warp()); }

[[noreturn]] void fiber_entry() {
  run_kernel(parameters);
  races::settle();
  if (has_stores_under_way(current)) fail("a thread ends before its boxes have been read");
  living[current] = false;
  --alive;
  if (--alive_in_block[rank()] == 0 && cluster > 1) races::block_ended(rank());
  ++progress;
  yield();
  abort();
}

void prepare(int i) {
  Fiber& fiber = fibers[i];
  if (!fiber.stack) fiber.stack = static_cast<unsigned char*>(malloc(STACK_BYTES));
  // As `emulator_switch` leaves a stack: six registers, then the address to go on at. The ABI wants the stack at 16 n + 8 there.
  auto top = reinterpret_cast<uintptr_t>(fiber.stack + STACK_BYTES) & ~uintptr_t(63);
  void** stack = reinterpret_cast<void**>(top - 16);
  *stack = reinterpret_cast<void*>(&fiber_entry);
  stack -= 6;
  memset(stack, 0, 6 * sizeof *stack);
  fiber.stack_pointer = stack;
  living[i] = true;
  forget_copies(i);
  forget_products(i);
}

// Threads that get no turn: from `first` on, as many as `count`.
struct Late { int first, count; };
Late pick_late() {
  if (lateness == 0) return {0, 0};
  const auto next = [] {  // xorshift (Marsaglia 2003)
    lateness ^= lateness << 13;
    lateness ^= lateness >> 17;
    return lateness ^= lateness << 5;
  };
  const int sizes[] = {WARP, WARPGROUP, block_threads}, count = sizes[next() % 3];
  return {static_cast<int>(next() % static_cast<u32>((threads + count - 1) / count)) * count, count};
}

// Runs every thread of the present cluster to its end; false where none can go on.
bool run_cluster() {
  cluster_meeting = {};
  for (auto& meeting : block_meetings) meeting = {};
  for (auto& meeting : warp_meetings) meeting = {};
  for (auto& meeting : warpgroup_meetings) meeting = {};
  for (auto& meeting : numbered_meetings) meeting = {};
  alive = threads;
  for (int& of_block : alive_in_block) of_block = block_threads;
  for (int i = 0; i < threads; ++i) prepare(i);
  Late late = pick_late();
  while (alive > 0) {
    const u64 before = progress;
    for (int turn = 0; turn < threads; ++turn) {
      const int i = last_first ? threads - 1 - turn : turn;
      if (!living[i] || (i >= late.first && i < late.first + late.count)) continue;
      current = i;
      thread = {static_cast<u32>(i % block_threads), 0, 0};
      block = {first_block.x + rank(), first_block.y, first_block.z};
      emulator_switch(&scheduler_stack, fibers[i].stack_pointer);
      if (alive < 0) return false;
    }
    if (progress != before) {
      if (late.count == 0) late = pick_late();
    } else if (late.count > 0) {
      late = {0, 0};
    } else if (alive > 0) {
      snprintf(message, MESSAGE_BYTES, "block (%u, %u, %u): %d threads wait for ever", first_block.x, first_block.y, first_block.z, alive);
      return false;
    }
  }
  return true;
}

}  // namespace

void yield() {
  races::settle();
  emulator_switch(&fibers[current].stack_pointer, scheduler_stack);
}

void note_progress() { ++progress; }

u32 rank() { return static_cast<u32>(current / block_threads); }
u32 cluster_size() { return cluster; }
bool has_ended(u32 of) { return alive_in_block[of] == 0; }

void fail(const char* what) {
  snprintf(message, MESSAGE_BYTES, "thread %u of block (%u, %u, %u): %s", thread.x, block.x, block.y, block.z, what);
  alive = -1;
  for (;;) emulator_switch(&fibers[current].stack_pointer, scheduler_stack);
}

void sync_block() {
  meet(block_meetings[rank()], [] { return alive_in_block[rank()]; }, [] {
    if (cluster == 1) races::block_synced(living);
    else races::synced(static_cast<int>(rank()) * block_threads, block_threads);
  });
}
void meet_cluster() {
  meet(cluster_meeting, [] { return alive; }, [] { races::synced(0, threads); });
}
void sync_warp() {
  meet(warp_meetings[current / WARP], lanes, [] { races::synced(first_of_warp(), lanes()); });
}
void meet_warp() {
  meet(warp_meetings[current / WARP], lanes, [] {});
}

void meet_warpgroup() {
  meet(warpgroup_meetings[current / WARPGROUP], [] { return WARPGROUP; }, [] {});
}

// Every block has barriers of its own.
u32 numbered(u32 number) {
  if (number >= NUMBERED) fail("there are 16 numbered barriers");
  return rank() * NUMBERED + number;
}
void meet_at(u32 number, int expected) {
  number = numbered(number);
  races::numbered_arrived(number);
  meet(numbered_meetings[number], [expected] { return expected; }, [number] { races::numbered_completed(number); });
  races::numbered_passed(number);
}
void pass_by(u32 number, int expected) {
  number = numbered(number);
  races::numbered_arrived(number);
  auto& meeting = numbered_meetings[number];
  if (++meeting.arrived >= expected) {
    races::numbered_completed(number);
    meeting = {0, meeting.generation + 1};
  }
  note_progress();
}

u64 exchange(u64 bits, int source) {
  const int warp = current / WARP;
  exchanged[warp][current % WARP] = bits;
  meet_warp();
  const u64 result = exchanged[warp][source];
  meet_warp();
  return result;
}

}  // namespace emulator

// Runs a kernel over a grid. `sizes`: of the grid, the threads of a block, whether the last comes first, bytes of dynamic shared memory,
// the blocks of a cluster, and, where some are to be late, a number to choose them by. What lies between `static_begin` and
// `static_end` is its static shared memory. 1 where it fails: `message` says how.
extern "C" int emulate(void (*kernel)(const void*), const void* params, const unsigned* sizes, unsigned char* static_begin,
                       unsigned char* static_end, char* message) {
  using namespace emulator;
  run_kernel = kernel;
  parameters = params;
  emulator::message = message;
  grid = {sizes[0], sizes[1], sizes[2]};
  block_threads = static_cast<int>(sizes[3]);
  block_size = {sizes[3], 1, 1};
  last_first = sizes[4] != 0;
  cluster = sizes[6];
  lateness = sizes[7];
  threads = block_threads * static_cast<int>(cluster);
  const char* refused = cluster > MAX_CLUSTER || threads > MAX_THREADS ? "a cluster is larger than the emulator has room for"
                        : grid.x % cluster                             ? "the grid is not made of whole clusters"
                        : cluster > 1 && block_threads % WARPGROUP     ? "blocks of clusters are emulated in whole warpgroups"
                        : cluster > 1 && static_begin != static_end    ? "static shared memory of clusters is not emulated"
                                                                       : nullptr;
  if (refused) {
    snprintf(message, MESSAGE_BYTES, "%s", refused);
    return 1;
  }
  for (u32 z = 0; z < grid.z; ++z)
    for (u32 y = 0; y < grid.y; ++y)
      for (u32 x = 0; x < grid.x; x += cluster) {
        first_block = {x, y, z};
        for (u32 i = 0; i < cluster; ++i) memset(shared_memory + i * SHARED_BYTES, 0xFF, sizes[5]);  // reads NaN until written
        memset(static_begin, 0xFF, static_cast<size_t>(static_end - static_begin));
        races::begin_cluster(static_cast<int>(cluster), block_threads, sizes[5], static_begin, static_end);
        if (!run_cluster()) return 1;
      }
  return 0;
}
