// See races.h.
#include "races.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <vector>

#include "threads.h"

namespace emulator::races {
namespace {

constexpr u32 AGENTS = ENGINES + MAX_THREADS, UNFINISHED = ~0u;
constexpr u32 GRANULE = 16;  // bytes that are kept together; an entry has a bit for each
using Bytes = unsigned short;

struct Entry {
  u32 clock;
  unsigned short agent;
  Bytes bytes;
  bool atomic;
  const void* where;
};
struct Word {
  u32 epoch = 0;
  std::vector<Entry> reads, writes;
};
using Clocks = u32[AGENTS];

std::vector<Word> words;
// Epochs end at barriers of a block that is alone: what is older every thread has seen. `now` is the latest time of any agent's clock.
u32 epoch, first_epoch, now, agents;  // first_epoch: of this block
int threads, block_threads, blocks;  // threads of all blocks
u32 dynamic_bytes, dynamic_words;    // of each block
unsigned char *static_begin, *static_end;
Clocks known[MAX_THREADS], arriving[ENGINES], completed[ENGINES], numbered_arriving[MAX_CLUSTER * NUMBERED], numbered_done[MAX_CLUSTER * NUMBERED];
u32 own[AGENTS];
u32 fenced[MAX_THREADS];  // the time of each thread's latest fence for asynchronous work
u32 engines, engine_address[ENGINES];

// A write over another's whose order nothing decides: a race if it changes anything, which is seen after it.
struct Overwriting {
  bool open = false;
  unsigned char* place;
  unsigned char before[GRANULE];
  Bytes bytes;
  char message[MESSAGE_BYTES];
} overwriting;

u32 agent_of(int thread) { return ENGINES + static_cast<u32>(thread); }

void learn(Clocks& to, const Clocks& from) {
  for (u32 i = 0; i < agents; ++i) to[i] = std::max(to[i], from[i]);
}
void publish(int thread) { known[thread][agent_of(thread)] = own[agent_of(thread)]; }
void advance(int thread) { own[agent_of(thread)] = ++now; }

bool is_seen(int thread, const Entry& e) {
  if (e.clock == UNFINISHED) return false;
  return e.agent == agent_of(thread) || known[thread][e.agent] >= e.clock;
}

// Words are counted through the dynamic shared memory of all blocks, then through the static one.
u32 all_dynamic() { return static_cast<u32>(blocks) * dynamic_words; }
unsigned char* place_of(u32 index) {
  if (index >= all_dynamic()) return static_begin + GRANULE * (index - all_dynamic());
  return shared_memory + index / dynamic_words * SHARED_BYTES + GRANULE * (index % dynamic_words);
}

// Places are given as offsets in the kernel's library, which emulator.py looks up.
long offset_of(const void* place) {
  Dl_info library;
  return dladdr(place, &library) ? static_cast<const char*>(place) - static_cast<const char*>(library.dli_fbase) : 0;
}

// `bytes`: those of word `index` that are in dispute.
void describe(char (&text)[MESSAGE_BYTES], const char* first, const Entry& e, const char* then, u32 index, Bytes bytes, const void* where) {
  char who[64];
  const u32 agent = e.agent - ENGINES, of_block = static_cast<u32>(block_threads);
  if (e.agent < ENGINES) snprintf(who, sizeof who, "the copy engine");
  else if (blocks == 1) snprintf(who, sizeof who, "thread %u", agent);
  else snprintf(who, sizeof who, "thread %u of block %u of the cluster", agent % of_block, agent / of_block);
  const bool dynamic = index < all_dynamic();
  const u32 byte = GRANULE * (dynamic ? index % dynamic_words : index - all_dynamic()) + static_cast<u32>(__builtin_ctz(bytes));
  snprintf(text, sizeof text, "race: %s %s [+%#lx], and %s [+%#lx] byte %u of %s shared memory, in no order", who, first,
           static_cast<unsigned long>(offset_of(e.where)), then, static_cast<unsigned long>(offset_of(where)), byte,
           dynamic ? "dynamic" : "static");
}

template <class TEST> void drop(std::vector<Entry>& list, TEST test) {
  if (!list.empty()) list.erase(std::remove_if(list.begin(), list.end(), test), list.end());
}

// What is known of a word; what every thread has seen is dropped first.
Word& word_at(u32 index) {
  Word& w = words[index];
  if (w.epoch == epoch) return w;
  for (auto* list : {&w.reads, &w.writes}) {
    if (w.epoch < first_epoch) list->clear();
    else drop(*list, [](const Entry& e) { return e.clock != UNFINISHED && e.agent >= ENGINES; });
  }
  w.epoch = epoch;
  return w;
}

[[noreturn]] void report(const char* first, const Entry& e, const char* then, u32 index, Bytes bytes, const void* where) {
  char text[MESSAGE_BYTES];
  describe(text, first, e, then, index, e.bytes & bytes, where);
  fail(text);
}

void check_read(u32 index, Bytes bytes, const void* where) {
  for (const Entry& e : word_at(index).writes)
    if (e.bytes & bytes && !is_seen(current, e)) report(e.clock == UNFINISHED ? "is writing" : "wrote", e, "this one reads", index, bytes, where);
}
// What threads wrote asynchronous work reads only behind a fence of theirs.
void check_fenced(u32 index, Bytes bytes, const void* where) {
  for (const Entry& e : words[index].writes)
    if (e.bytes & bytes && e.agent >= ENGINES && !e.atomic && e.clock > fenced[e.agent - ENGINES])
      report("wrote without a fence for asynchronous work", e, "this one has it read", index, bytes, where);
}
// `may_repeat`: the write is done at once, and is no race where it leaves what another wrote.
void check_write(u32 index, Bytes bytes, bool atomic, bool may_repeat, const void* where) {
  Word& w = word_at(index);
  for (const Entry& e : w.reads)
    if (e.bytes & bytes && !is_seen(current, e)) report(e.clock == UNFINISHED ? "is reading" : "read", e, "this one writes", index, bytes, where);
  for (const Entry& e : w.writes) {
    if (!(e.bytes & bytes) || (e.atomic && atomic) || is_seen(current, e)) continue;
    const char* first = e.clock == UNFINISHED ? "is writing" : "wrote";
    if (!may_repeat) report(first, e, "this one writes", index, bytes, where);
    overwriting.open = true;
    overwriting.place = place_of(index);
    overwriting.bytes = e.bytes & bytes;
    memcpy(overwriting.before, overwriting.place, GRANULE);
    describe(overwriting.message, first, e, "this one writes something else to", index, overwriting.bytes, where);
    return;
  }
}

void note_read(Word& w, const Entry& entry) {
  if (!w.reads.empty()) {
    Entry& last = w.reads.back();
    if (last.agent == entry.agent && last.bytes == entry.bytes && last.clock != UNFINISHED) {
      last = entry;
      return;
    }
  }
  if (w.reads.size() >= 4 * static_cast<size_t>(threads)) {  // of each agent the latest for the same bytes
    std::vector<Entry> kept;
    for (auto e = w.reads.rbegin(); e != w.reads.rend(); ++e) {
      const auto is_covered = [&](const Entry& later) {
        return later.agent == e->agent && !(e->bytes & ~later.bytes) && later.clock != UNFINISHED;
      };
      if (e->clock == UNFINISHED || std::none_of(kept.begin(), kept.end(), is_covered)) kept.push_back(*e);
    }
    w.reads.assign(kept.rbegin(), kept.rend());
  }
  w.reads.push_back(entry);
}
// Whoever is in order with a write is in order with what was before it.
void note_write(Word& w, const Entry& entry) {
  for (auto* list : {&w.reads, &w.writes}) {
    for (Entry& e : *list) e.bytes &= static_cast<Bytes>(~entry.bytes);
    drop(*list, [](const Entry& e) { return !e.bytes; });
  }
  w.writes.push_back(entry);
}

// Calls `visit(word, bytes within it)` for what lies in shared memory.
template <class VISIT> void for_words(const void* p, u32 count, VISIT visit) {
  const auto* at = static_cast<const unsigned char*>(p);
  u32 first;
  if (at >= shared_memory && at < shared_memory + MAX_CLUSTER * SHARED_BYTES) {
    const u32 offset = static_cast<u32>(at - shared_memory), within = offset % SHARED_BYTES;
    if (within + count > dynamic_bytes) fail("beyond the shared memory that the launch asks for");
    first = GRANULE * (offset / SHARED_BYTES * dynamic_words) + within;
  } else if (at >= static_begin && at < static_end) {
    first = GRANULE * all_dynamic() + static_cast<u32>(at - static_begin);
  } else {
    return;
  }
  for (u32 byte = first; byte < first + count;) {
    const u32 end = std::min(first + count, (byte / GRANULE + 1) * GRANULE), offset = byte % GRANULE;
    visit(byte / GRANULE, static_cast<Bytes>(((1u << (end - byte)) - 1) << offset));
    byte = end;
  }
}

u32 engine_of(u32 barrier) {
  for (u32 i = 0; i < engines; ++i)
    if (engine_address[i] == barrier) return i;
  fail("a barrier that was never initialised");
}

}  // namespace

void begin_cluster(int of_blocks, int count, u32 dynamic, unsigned char* begin, unsigned char* end) {
  blocks = of_blocks;
  block_threads = count;
  threads = blocks * count;
  agents = ENGINES + static_cast<u32>(threads);
  dynamic_bytes = dynamic;
  dynamic_words = (dynamic + GRANULE - 1) / GRANULE;
  static_begin = begin;
  static_end = end;
  overwriting.open = false;
  words.resize(std::max<size_t>(words.size(), all_dynamic() + (end - begin + GRANULE - 1) / GRANULE));
  if (now > 1u << 30) {  // clocks start anew: no entry is left
    now = 0;
    memset(known, 0, sizeof known);
    memset(own, 0, sizeof own);
    memset(fenced, 0, sizeof fenced);
    memset(numbered_arriving, 0, sizeof numbered_arriving);
  }
  engines = 0;
  first_epoch = ++epoch;
  for (int i = 0; i < threads; ++i) advance(i);
}

void block_ended(u32 rank) {
  settle();
  const int first = static_cast<int>(rank) * block_threads;
  for (int i = first; i < first + block_threads; ++i) {
    publish(i);
    learn(known[current], known[i]);
  }
  for (u32 index = rank * dynamic_words; index < (rank + 1) * dynamic_words; ++index) {
    const Word& w = word_at(index);
    for (const auto* list : {&w.reads, &w.writes})
      for (const Entry& e : *list)
        if (e.clock == UNFINISHED || known[current][e.agent] < e.clock) {
          char text[MESSAGE_BYTES];
          snprintf(text, sizeof text, "the block may end before its shared memory is reached from elsewhere [+%#lx]",
                   static_cast<unsigned long>(offset_of(e.where)));
          fail(text);
        }
  }
}

void settle() {
  if (!overwriting.open) return;
  overwriting.open = false;
  for (u32 i = 0; i < GRANULE; ++i)
    if (overwriting.bytes >> i & 1 && overwriting.place[i] != overwriting.before[i]) fail(overwriting.message);
}

void block_synced(const bool* alive) {
  settle();
  ++epoch;
  for (int i = 0; i < threads; ++i) advance(i);
  for (u32 engine = 0; engine < engines; ++engine) {
    u32 latest = 0;
    for (int i = 0; i < threads; ++i)
      if (alive[i]) latest = std::max(latest, known[i][engine]);
    for (int i = 0; i < threads; ++i) known[i][engine] = latest;
  }
}

void synced(int first, int count) {
  settle();
  for (int i = 0; i < count; ++i) publish(first + i);
  for (int i = 1; i < count; ++i) learn(known[first], known[first + i]);
  for (int i = 0; i < count; ++i) {
    if (i) memcpy(known[first + i], known[first], agents * sizeof(u32));
    advance(first + i);
  }
}

void writes_fenced() {
  settle();
  fenced[current] = own[agent_of(current)];
  publish(current);
  advance(current);
}

void numbered_arrived(u32 number) {
  settle();
  publish(current);
  learn(numbered_arriving[number], known[current]);
  advance(current);
}
void numbered_completed(u32 number) { memcpy(numbered_done[number], numbered_arriving[number], agents * sizeof(u32)); }
void numbered_passed(u32 number) { learn(known[current], numbered_done[number]); }

void barrier_made(u32 barrier, const void* where) {
  touch(Access::WRITE, shared_memory + barrier, 8, where);
  for (u32 i = 0; i < engines; ++i)
    if (engine_address[i] == barrier) fail("a barrier is initialised again");
  if (engines == ENGINES) fail("more barriers than the emulator has room for");
  engine_address[engines] = barrier;
  memset(arriving[engines], 0, sizeof arriving[engines]);
  memset(completed[engines], 0, sizeof completed[engines]);
  ++engines;
}
void barrier_arrived(u32 barrier, const void* where) {
  touch(Access::ATOMIC, shared_memory + barrier, 8, where);
  publish(current);
  learn(arriving[engine_of(barrier)], known[current]);
  advance(current);
}
void barrier_reached(u32 barrier, const void* where) {  // what the engine does there whoever passes has seen
  settle();
  for_words(shared_memory + barrier, 8, [&](u32 index, Bytes mask) { check_write(index, mask, true, false, where); });
}
void barrier_completed(u32 barrier) {
  const u32 engine = engine_of(barrier);
  memcpy(completed[engine], arriving[engine], agents * sizeof(u32));
}
void barrier_passed(u32 barrier, const void* where) {
  touch(Access::ATOMIC, shared_memory + barrier, 8, where);
  learn(known[current], completed[engine_of(barrier)]);
}

void touch(Access access, const void* p, u32 bytes, const void* where) {
  settle();
  const auto agent = static_cast<unsigned short>(agent_of(current));
  for_words(p, bytes, [&](u32 index, Bytes mask) {
    const Entry entry{own[agent], agent, mask, access == Access::ATOMIC, where};
    Word& w = words[index];
    switch (access) {
      case Access::READ:
        check_read(index, mask, where);
        note_read(w, entry);
        break;
      case Access::WRITE:
        check_write(index, mask, false, true, where);
        note_write(w, entry);
        break;
      case Access::ATOMIC:
        check_write(index, mask, true, false, where);
        drop(w.writes, [&](const Entry& e) { return e.atomic && e.agent == agent; });
        w.writes.push_back(entry);
    }
  });
}

void begin(Access access, const void* p, u32 bytes, const void* where) {
  settle();
  for_words(p, bytes, [&](u32 index, Bytes mask) {
    const Entry entry{UNFINISHED, static_cast<unsigned short>(agent_of(current)), mask, false, where};
    Word& w = words[index];
    if (access == Access::READ) {
      check_read(index, mask, where);
      check_fenced(index, mask, where);
      w.reads.push_back(entry);
    } else {
      check_write(index, mask, false, false, where);
      w.writes.push_back(entry);
    }
  });
}

void finish(Access access, const void* p, u32 bytes, const void* where) {
  for_words(p, bytes, [&](u32 index, Bytes mask) {
    auto& list = access == Access::READ ? words[index].reads : words[index].writes;
    const auto is_it = [&](const Entry& e) { return e.clock == UNFINISHED && e.agent == agent_of(current) && e.bytes == mask; };
    const auto found = std::find_if(list.begin(), list.end(), is_it);
    if (found != list.end()) list.erase(found);
  });
  touch(access, p, bytes, where);
}

void engine_writes(u32 barrier, const void* p, u32 bytes, const void* where) {
  settle();
  const u32 engine = engine_of(barrier);
  own[engine] = arriving[engine][engine] = ++now;
  for_words(p, bytes, [&](u32 index, Bytes mask) {
    check_write(index, mask, false, false, where);
    note_write(words[index], {own[engine], static_cast<unsigned short>(engine), mask, false, where});
  });
}

}  // namespace emulator::races

// What g++ -fsanitize=thread calls, with nothing of the sanitizer's own library.
using emulator::races::Access;

namespace {
inline bool is_shared(const void* p) {
  using namespace emulator;
  const auto* at = static_cast<const unsigned char*>(p);
  return static_cast<u64>(at - shared_memory) < MAX_CLUSTER * SHARED_BYTES || static_cast<u64>(at - races::static_begin) < static_cast<u64>(races::static_end - races::static_begin);
}
}  // namespace

#define HOOK(name, access, bytes) \
  void __tsan_##name(const void* p) { if (is_shared(p)) emulator::races::touch(Access::access, p, bytes, __builtin_return_address(0)); }
#define HOOKS(bytes) \
  HOOK(read##bytes, READ, bytes) HOOK(write##bytes, WRITE, bytes) HOOK(unaligned_read##bytes, READ, bytes) HOOK(unaligned_write##bytes, WRITE, bytes)

extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
void __tsan_read_range(const void* p, unsigned long bytes) {
  if (is_shared(p)) emulator::races::touch(Access::READ, p, static_cast<emulator::u32>(bytes), __builtin_return_address(0));
}
void __tsan_write_range(const void* p, unsigned long bytes) {
  if (is_shared(p)) emulator::races::touch(Access::WRITE, p, static_cast<emulator::u32>(bytes), __builtin_return_address(0));
}
void __tsan_init() {}
// An index beyond an array, as -fsanitize=bounds reports it. What it says first is where.
struct Place { const char* file; unsigned line, column; };
void __ubsan_handle_out_of_bounds(const Place* place, unsigned long index) {
  char text[256];
  snprintf(text, sizeof text, "index %lu is beyond its array (%s:%u)", index, place->file, place->line);
  emulator::fail(text);
}
}
