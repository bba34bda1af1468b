// Shared memory by address, asynchronous copies, mbarriers. An asynchronous copy happens when it is waited for.
#include <string.h>

#include <vector>

#include "races.h"
#include "threads.h"

namespace emulator {
namespace {

using races::Access;

struct Copy {
  u32 destination, bytes;
  const void *source, *where;
  bool valid;
};
using Group = std::vector<Copy>;
struct Copies {
  Group open;
  std::vector<Group> committed;  // oldest first
} copies[MAX_THREADS];
u32 exchanged[MAX_THREADS / WARP][WARP];

struct Sent {
  u32 source, column, row;
  const Map* map;
  const void* where;
  u32 bytes() const { return static_cast<u32>(map->box_rows * map->box_columns * map->element_bytes); }
};
struct Stores {
  std::vector<Sent> open;
  std::vector<std::vector<Sent>> committed;  // oldest first
} stores[MAX_THREADS];

bool is_own(u32 address, u64 bytes) {
  const u32 within = address - rank() * SHARED_BYTES;
  return within < SHARED_BYTES && within + bytes <= SHARED_BYTES;
}
void check(u32 address, u32 bytes) {
  if (!is_own(address, bytes) || address % bytes) fail("misaligned or wild shared memory access");
}

// The 64 bits of an mbarrier: its phase and what the phase still waits for.
struct Barrier { u32 pending : 15, expected : 15, phase : 1, valid : 1; int bytes; };
Barrier& barrier_at(u32 address) {
  if (address % 8 || address >= cluster_size() * SHARED_BYTES) fail("misaligned or wild barrier");
  return *reinterpret_cast<Barrier*>(shared_memory + address);
}
Barrier& own_barrier_at(u32 address) {
  if (!is_own(address, 8)) fail("a barrier of another block");
  return barrier_at(address);
}
void arrive(u32 barrier, const void* where);
void settle(u32 barrier) {
  Barrier& b = barrier_at(barrier);
  if (b.pending || b.bytes) return;
  b.phase ^= 1;
  b.pending = b.expected;
  races::barrier_completed(barrier);
  note_progress();
}

// As the copy engine does: fp32 is rounded to the nearest tf32 where the map says so, halves to the even one.
void copy_element(unsigned char* to, const void* from, u64 bytes, bool tf32) {
  memcpy(to, from, bytes);
  if (!tf32) return;
  u32 word;
  memcpy(&word, to, 4);
  if ((word & 0x7f800000) != 0x7f800000) word = (word + 0xfff + (word >> 13 & 1)) & ~0x1fffu;
  memcpy(to, &word, 4);
}

}  // namespace

void forget_copies(int thread) {
  copies[thread].open.clear();
  copies[thread].committed.clear();
  stores[thread].open.clear();
  stores[thread].committed.clear();
}
bool has_stores_under_way(int thread) { return !stores[thread].open.empty() || !stores[thread].committed.empty(); }

void load_shared(void* to, u32 address, u32 bytes, const void* where) {
  check(address, bytes);
  races::touch(Access::READ, shared_memory + address, bytes, where);
  memcpy(to, shared_memory + address, bytes);
}
void store_shared(u32 address, const void* from, u32 bytes, const void* where) {
  check(address, bytes);
  races::touch(Access::WRITE, shared_memory + address, bytes, where);
  memcpy(shared_memory + address, from, bytes);
}

// Lane l gives the address of row l % 8 of matrix l / 8; it gets elements 2 (l % 4) and the next of row l / 4.
void load_matrices(u32 (&r)[4], u32 address, bool transposed, const void* where) {
  check(address, 16);
  races::touch(Access::READ, shared_memory + address, 16, where);
  const int warp = current / WARP, lane = current % WARP;
  exchanged[warp][lane] = address;
  meet_warp();
  for (int i = 0; i < 4; ++i) {
    unsigned short pair[2];
    for (int j = 0; j < 2; ++j) {
      const int row = transposed ? lane % 4 * 2 + j : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + j;
      memcpy(&pair[j], shared_memory + exchanged[warp][8 * i + row] + 2 * column, 2);
    }
    memcpy(&r[i], pair, 4);
  }
  meet_warp();
}

// The other way: lane l has elements 2 (l % 4) and the next of row l / 4 of each matrix.
void store_matrices(u32 address, const u32 (&r)[4], const void* where) {
  check(address, 16);
  races::touch(Access::WRITE, shared_memory + address, 16, where);
  const int warp = current / WARP, lane = current % WARP;
  exchanged[warp][lane] = address;
  meet_warp();
  for (int i = 0; i < 4; ++i) memcpy(shared_memory + exchanged[warp][8 * i + lane / 4] + 4 * (lane % 4), &r[i], 4);
  meet_warp();
}

void copy_async(u32 destination, const void* source, u32 bytes, bool valid, const void* where) {
  check(destination, bytes);
  if (valid && reinterpret_cast<uintptr_t>(source) % bytes) fail("cp.async from a misaligned address");
  races::begin(Access::WRITE, shared_memory + destination, bytes, where);
  copies[current].open.push_back({destination, bytes, source, where, valid});
}
void copy_async_commit() {
  copies[current].committed.push_back(std::move(copies[current].open));
  copies[current].open.clear();
}
void copy_async_wait(int pending) {
  auto& groups = copies[current].committed;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Copy& copy : groups.front()) {
      races::finish(Access::WRITE, shared_memory + copy.destination, copy.bytes, copy.where);
      if (copy.valid) memcpy(shared_memory + copy.destination, copy.source, copy.bytes);
      else memset(shared_memory + copy.destination, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

void barrier_init(u32 barrier, u32 arrivals, const void* where) {
  Barrier& b = own_barrier_at(barrier);
  races::barrier_made(barrier, where);
  b = {arrivals, arrivals, 0, 1, 0};
}
void barrier_arrive(u32 barrier, const void* where) {
  own_barrier_at(barrier);
  arrive(barrier, where);
}
void barrier_arrive_expect(u32 barrier, u32 bytes, const void* where) {
  own_barrier_at(barrier).bytes += static_cast<int>(bytes);
  arrive(barrier, where);
}
u32 address_in_cluster(u32 address, u32 rank) {
  if (rank >= cluster_size()) fail("the cluster has no such block");
  return address % SHARED_BYTES + rank * SHARED_BYTES;
}
void barrier_arrive_in_cluster(u32 barrier, const void* where) {
  barrier_at(barrier);
  if (has_ended(barrier / SHARED_BYTES)) fail("an arrival in a block that has ended");
  arrive(barrier, where);
}
void barrier_wait(u32 barrier, u32 parity, const void* where) {
  while (own_barrier_at(barrier).phase == parity) yield();
  races::barrier_passed(barrier, where);
}

namespace {

void arrive(u32 barrier, const void* where) {
  Barrier& b = barrier_at(barrier);
  races::barrier_arrived(barrier, where);
  if (b.pending == 0) fail("more arrivals at a barrier than it was initialised for");
  b.pending = b.pending - 1;
  settle(barrier);
}

// To shared memory of any block of the cluster.
void bring_box(u32 destination, const Map& map, u32 barrier, u32 column, u32 row, u32 inner, u32 outer, const void* where) {
  const u64 row_bytes = map.box_columns * map.element_bytes;
  if (row_bytes != 64 && row_bytes != 128) fail("only boxes of 64 and 128 bytes are emulated");
  if (destination % 128) fail("a box starts at a multiple of 128 bytes");  // the swizzle is one of addresses, not of rows of a box
  if (destination % SHARED_BYTES + map.box_rows * row_bytes > SHARED_BYTES) fail("a box lands outside shared memory");
  races::engine_writes(barrier, shared_memory + destination, static_cast<u32>(map.box_rows * row_bytes), where);
  const auto signed_row = static_cast<int>(row), signed_column = static_cast<int>(column);
  for (u64 r = 0; r < map.box_rows; ++r)
    for (u64 c = 0; c < map.box_columns; ++c) {
      const u64 linear = destination + r * row_bytes + c * map.element_bytes, to = linear ^ (linear >> 7 & (row_bytes == 128 ? 7 : 3)) << 4;
      const long long from_row = signed_row + static_cast<long long>(r), from_column = signed_column + static_cast<long long>(c);
      const bool inside = from_row >= 0 && from_column >= 0 && from_row < static_cast<long long>(map.rows) &&
                          from_column < static_cast<long long>(map.columns) && inner < map.outer_size[0] && outer < map.outer_size[1];
      const u64 from = map.address + static_cast<u64>(from_row) * map.row_bytes + static_cast<u64>(from_column) * map.element_bytes +
                       inner * map.outer_bytes[0] + outer * map.outer_bytes[1];
      if (!inside) {
        memset(shared_memory + to, 0, map.element_bytes);
      } else {
        copy_element(shared_memory + to, reinterpret_cast<const void*>(from), map.element_bytes, map.tf32);
      }
    }
  barrier_at(barrier).bytes -= static_cast<int>(map.box_rows * row_bytes);
  settle(barrier);
}

}  // namespace

void copy_box(u32 destination, const Map& map, u32 barrier, u32 column, u32 row, u32 inner, u32 outer, const void* where) {
  own_barrier_at(barrier);
  if (!is_own(destination, 1)) fail("a box lands in another block");
  bring_box(destination, map, barrier, column, row, inner, outer, where);
}
namespace {

// Has `bring` copy to each of the blocks, to where `destination` and `barrier` lie in it.
template <class BRING> void bring_to_blocks(u32 destination, u32 barrier, u32 blocks, const void* where, BRING&& bring) {
  if (blocks == 0 || blocks >> cluster_size()) fail("a copy to a block that the cluster has not");
  for (u32 to = 0; to < cluster_size(); ++to) {
    if (!(blocks >> to & 1)) continue;
    if (has_ended(to)) fail("a copy to a block that has ended");
    const u32 there = address_in_cluster(barrier, to);
    races::barrier_reached(there, where);
    bring(address_in_cluster(destination, to), there);
  }
}

}  // namespace

void copy_box_to_blocks(u32 destination, const Map& map, u32 barrier, u32 column, u32 row, u32 blocks, const void* where) {
  bring_to_blocks(destination, barrier, blocks, where, [&](u32 to, u32 there) { bring_box(to, map, there, column, row, 0, 0, where); });
}

void store_async(u32 address, const void* from, u32 barrier, const void* where) {
  if (address % 16 || address >= cluster_size() * SHARED_BYTES) fail("misaligned or wild store to the cluster");
  if (barrier / SHARED_BYTES != address / SHARED_BYTES) fail("a store to the cluster and its barrier lie in different blocks");
  if (has_ended(address / SHARED_BYTES)) fail("a store to a block that has ended");
  races::barrier_reached(barrier, where);
  races::engine_writes(barrier, shared_memory + address, 16, where);
  memcpy(shared_memory + address, from, 16);
  barrier_at(barrier).bytes -= 16;
  settle(barrier);
}

void store_box(u32 source, const Map& map, u32 column, u32 row, const void* where) {
  const u64 row_bytes = map.box_columns * map.element_bytes;
  if (map.element_bytes != 2 || (row_bytes != 64 && row_bytes != 128)) fail("only boxes of 64 and 128 bytes of halves are stored");
  if (map.address % 16 || map.row_bytes % 16) fail("rows of a tensor start at multiples of 16 bytes");
  if (source % (8 * row_bytes)) fail("a box starts at a swizzle atom");
  const Sent sent{source, column, row, &map, where};
  if (!is_own(source, sent.bytes())) fail("a box lies outside shared memory");
  races::begin(Access::READ, shared_memory + source, sent.bytes(), where);
  stores[current].open.push_back(sent);
}
void store_box_commit() {
  stores[current].committed.push_back(std::move(stores[current].open));
  stores[current].open.clear();
}
void store_box_wait(int pending) {
  auto& groups = stores[current].committed;
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Sent& sent : groups.front()) {
      const Map& map = *sent.map;
      const u64 row_bytes = map.box_columns * map.element_bytes;
      for (u64 r = 0; r < map.box_rows && sent.row + r < map.rows; ++r)
        for (u64 c = 0; c < map.box_columns && sent.column + c < map.columns; ++c) {
          const u64 linear = sent.source + r * row_bytes + c * 2, from = linear ^ (linear >> 7 & (row_bytes == 128 ? 7 : 3)) << 4;
          memcpy(reinterpret_cast<unsigned char*>(map.address) + (sent.row + r) * map.row_bytes + (sent.column + c) * 2, shared_memory + from, 2);
        }
      races::finish(Access::READ, shared_memory + sent.source, sent.bytes(), sent.where);
    }
    groups.erase(groups.begin());
  }
}

// After the PTX manual's description of the im2col mode. The map's 128 bytes are those that emulator.py writes.
struct PixelMap {
  u64 address;
  u32 channels, size[3], images;
  u64 stride[3], image_stride;
  short lower[3], upper[3], step[3];  // x first
  unsigned char tf32;
  u32 element_bytes, box_channels, box_pixels, axes;
};
static_assert(sizeof(PixelMap) <= sizeof(Map), "");

namespace {

// To shared memory of any block of the cluster.
void bring_pixels(u32 destination, const Map& packed, u32 barrier, u32 channel, const int (&start)[3], u32 image, const u32 (&offset)[3], u32 axes, const void* where) {
  PixelMap map;
  memcpy(&map, &packed, sizeof map);
  if (map.axes != axes) fail("the copy has other axes than the map");
  const u32 row_bytes = map.box_channels * map.element_bytes;
  if (destination % (8 * row_bytes)) fail("a box starts at a swizzle atom");
  // Seen on an H100 (an illegal instruction), not in the manual.
  if (channel * map.element_bytes % 16) fail("a walk begins at channels that lie at a multiple of 16 bytes");
  if (destination % SHARED_BYTES + map.box_pixels * row_bytes > SHARED_BYTES) fail("a box lands outside shared memory");
  races::engine_writes(barrier, shared_memory + destination, map.box_pixels * row_bytes, where);
  long long at[3], last[3];
  for (u32 i = 0; i < 3; ++i) {
    if (offset[i] > (axes == 2 ? 255u : 31u)) fail("an offset has more bits than the copy takes");
    at[i] = start[i];
    last[i] = static_cast<long long>(map.size[i]) - 1 + map.upper[i];
    if (at[i] < map.lower[i] || at[i] > last[i]) fail("a walk begins outside its bounding box");
    if ((at[i] - map.lower[i]) % map.step[i]) fail("a walk begins between its steps");
  }
  long long n = image;
  for (u32 pixel = 0; pixel < map.box_pixels; ++pixel) {
    bool inside = n < map.images;
    u64 from = map.address + n * map.image_stride;
    for (u32 i = 0; i < 3; ++i) {
      const long long place = at[i] + offset[i];
      inside = inside && place >= 0 && place < static_cast<long long>(map.size[i]);
      from += place * map.stride[i];
    }
    for (u32 c = 0; c < map.box_channels; ++c) {
      const u32 linear = destination + pixel * row_bytes + c * map.element_bytes, to = linear ^ (linear >> 7 & (row_bytes / 16 - 1)) << 4;
      unsigned char* target = shared_memory + to;
      const unsigned char* source = reinterpret_cast<const unsigned char*>(from) + (static_cast<u64>(channel) + c) * map.element_bytes;
      if (!inside || channel + c >= map.channels) memset(target, 0, map.element_bytes);
      else copy_element(target, source, map.element_bytes, map.tf32);
    }
    // On to the next pixel of the box: along x, then y, then z, then the next image.
    u32 axis = 0;
    while (axis < 3 && (at[axis] += map.step[axis]) > last[axis]) {
      at[axis] = map.lower[axis];
      ++axis;
    }
    if (axis == 3) ++n;
  }
  barrier_at(barrier).bytes -= static_cast<int>(map.box_pixels * row_bytes);
  settle(barrier);
}

}  // namespace

void copy_pixels(u32 destination, const Map& map, u32 barrier, u32 channel, const int (&start)[3], u32 image, const u32 (&offset)[3], u32 axes, const void* where) {
  own_barrier_at(barrier);
  if (!is_own(destination, 1)) fail("a box lands in another block");
  bring_pixels(destination, map, barrier, channel, start, image, offset, axes, where);
}
void copy_pixels_to_blocks(u32 destination, const Map& map, u32 barrier, u32 blocks, u32 channel, const int (&start)[3], u32 image, const u32 (&offset)[3], u32 axes, const void* where) {
  bring_to_blocks(destination, barrier, blocks, where, [&](u32 to, u32 there) {
    bring_pixels(to, map, there, channel, start, image, offset, axes, where);
  });
}

void shared_writes_fence() { races::writes_fenced(); }

void access_atomically(const void* p, u32 bytes, const void* where) { races::touch(Access::ATOMIC, p, bytes, where); }

}  // namespace emulator
