// Threads of a block as fibers, barriers, and the run of a grid.
//
// Blocks run one after the other. A fiber runs until it has to wait, in one of two orders, from the first thread on or from the
// last: a result that depends on which thread comes first differs.
#include "threads.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "races.h"

namespace emulator {

Index thread, block, grid, block_size;
int current;
alignas(1024) unsigned char shared_memory[SHARED_BYTES];

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
int threads, alive;
bool last_first;  // the order in which threads take their turns
u64 progress;     // counts what may free a waiting thread
void* scheduler_stack;
Meeting block_meeting, warp_meetings[MAX_THREADS / WARP], warpgroup_meetings[MAX_THREADS / WARPGROUP], numbered_meetings[NUMBERED];
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

// Runs every thread of the present block to its end; false where none can go on.
bool run_block() {
  block_meeting = {};
  for (auto& meeting : warp_meetings) meeting = {};
  for (auto& meeting : warpgroup_meetings) meeting = {};
  for (auto& meeting : numbered_meetings) meeting = {};
  alive = threads;
  for (int i = 0; i < threads; ++i) prepare(i);
  while (alive > 0) {
    const u64 before = progress;
    for (int turn = 0; turn < threads; ++turn) {
      const int i = last_first ? threads - 1 - turn : turn;
      if (!living[i]) continue;
      current = i;
      thread = {static_cast<u32>(i), 0, 0};
      emulator_switch(&scheduler_stack, fibers[i].stack_pointer);
      if (alive < 0) return false;
    }
    if (alive > 0 && progress == before) {
      snprintf(message, MESSAGE_BYTES, "block (%u, %u, %u): %d threads wait for ever", block.x, block.y, block.z, alive);
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

void fail(const char* what) {
  snprintf(message, MESSAGE_BYTES, "thread %d of block (%u, %u, %u): %s", current, block.x, block.y, block.z, what);
  alive = -1;
  for (;;) emulator_switch(&fibers[current].stack_pointer, scheduler_stack);
}

void sync_block() {
  meet(block_meeting, [] { return alive; }, [] { races::block_synced(living); });
}
void sync_warp() {
  meet(warp_meetings[current / WARP], lanes, [] { races::warp_synced(first_of_warp(), lanes()); });
}
void meet_warp() {
  meet(warp_meetings[current / WARP], lanes, [] {});
}

void meet_warpgroup() {
  meet(warpgroup_meetings[current / WARPGROUP], [] { return WARPGROUP; }, [] {});
}

void meet_at(u32 number, int expected) {
  if (number >= NUMBERED) fail("there are 16 numbered barriers");
  races::numbered_arrived(number);
  meet(numbered_meetings[number], [expected] { return expected; }, [number] { races::numbered_completed(number); });
  races::numbered_passed(number);
}
void pass_by(u32 number, int expected) {
  if (number >= NUMBERED) fail("there are 16 numbered barriers");
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

// Runs a kernel over a grid. `sizes`: of the grid, the threads of a block, whether the last comes first, bytes of dynamic shared memory.
// What lies between `static_begin` and `static_end` is its static shared memory. 1 where it fails: `message` says how.
extern "C" int emulate(void (*kernel)(const void*), const void* params, const unsigned* sizes, unsigned char* static_begin,
                       unsigned char* static_end, char* message) {
  using namespace emulator;
  run_kernel = kernel;
  parameters = params;
  emulator::message = message;
  grid = {sizes[0], sizes[1], sizes[2]};
  threads = static_cast<int>(sizes[3]);
  block_size = {sizes[3], 1, 1};
  last_first = sizes[4] != 0;
  for (u32 z = 0; z < grid.z; ++z)
    for (u32 y = 0; y < grid.y; ++y)
      for (u32 x = 0; x < grid.x; ++x) {
        block = {x, y, z};
        memset(shared_memory, 0xFF, sizes[5]);  // reads NaN until written
        memset(static_begin, 0xFF, static_cast<size_t>(static_end - static_begin));
        races::begin_block(threads, sizes[5], static_begin, static_end);
        if (!run_block()) return 1;
      }
  return 0;
}
