// The last warpgroup of attention_wgmma.cuh: it takes items and keeps the rings filled. Included there behind the constants.
// The copier, one thread, starts copies. With a bias by key or packed sequences a warp beside it brings biases or makes zeros, and the
// scout finds out what comes next.
#pragma once
#include "attention_memory.cuh"
#include "attention_packed.cuh"
#include "ptx/grid.cuh"
#include "scheduler/counter.cuh"

DEVICE void produce(const Params& p, const Memory& memory) {
  u8* const shared = memory.shared;
  const u32 base = memory.base;
  const Ring<Q_STAGES>& q_ring = memory.q_ring;
  const Ring<1>& scouted = memory.scouted;
  const Ring<STAGES>& k_ring = memory.k_ring;
  const Ring<STAGES>& v_ring = memory.v_ring;
  const u32 cut_landed = memory.cut_landed;
  float* const biases = memory.biases;
  Item* const items = memory.items;
  u32 turn = 0, q_turn = 0;  // of the rings
  give_registers<PRODUCER_REGISTERS>();
  const u32 warp = threadIdx.x / 32 & 3, lane = threadIdx.x & 31;
  const u32 end = (p.queries + QUERIES - 1) / QUERIES * p.groups;
  u32 index = blockIdx.x;
  const Item first = PACKED && !SINGLE ? Item{} : item_of(p, index);
  Place* const places = reinterpret_cast<Place*>(shared + PLACES);
  const auto sort = [&] {
    if (PACKED && !SINGLE && warp == 2) sort_sequences(p, places, reinterpret_cast<u32*>(places + config::places));
  };
  if (config::early) sort();
  wait_for_previous_kernel();
  if (!config::early) sort();
  const u32 length = SINGLE ? min(Sequences::start(p, 1), p.queries) : 0;
  // The next item, for the copier and the warp of the biases. Without a scout the one behind it is asked for at once.
  const auto take = [&](u32 item_turn) -> Item {
    if constexpr (SCOUT) {
      scouted.wait_full(item_turn);
      return items[Q_STAGES];
    }
    if (index >= end) return {};
    const Item item = item_turn == 0 ? first : item_of(p, index);
    index = item_after<config::dynamic>(p, index);
    return SINGLE ? single_item(p, item, length) : item;
  };
  if (warp == 0 && lane == 0) {
    const auto copy_q = [&](const Item& item) {
      const u32 batch = item.group / p.heads, head = item.group - batch * p.heads;
      const u32 tile = q_ring.tile(q_turn), landed = q_ring.landed(q_turn), row0 = begin_of(item) + item.query0;
      if constexpr (ENDS) {
        QTile::bring_up_to<config::box>(item.rows - item.query0, tile, p.map_q, Ends::q(p), landed, row0, head);
      } else {
        barrier_arrive_expect(landed, QTile::BYTES);
        QTile::copy(tile, p.map_q, landed, row0, head, batch * p.q_batches);
      }
    };
    const auto copy_k = [&](const Item& item, u32 tile) {
      const u32 batch = item.group / p.heads, head = item.group - batch * p.heads, key0 = begin_of(item) + tile * KEYS;
      k_ring.wait_empty(turn);
      if constexpr (ENDS) {
        const u32 keys = item.keys - tile * KEYS, k_head = head / p.heads_per_k;
        KTile::bring_up_to<config::box>(keys, k_ring.tile(turn), p.map_k, Ends::k(p), k_ring.landed(turn), key0, k_head);
      } else {
        barrier_arrive_expect(k_ring.landed(turn), KTile::BYTES + BiasTile::BYTES);
        if (FULL) {
          const u32 biases_of_tile = base + BIASES + turn % STAGES * BiasTile::BYTES;
          BiasTile::copy(biases_of_tile, p, k_ring.landed(turn), tile * KEYS, item.query0, head * p.bias_heads, batch * p.bias_batches);
        }
        KTile::copy(k_ring.tile(turn), p.map_k, k_ring.landed(turn), key0, head / p.heads_per_k, batch * p.k_batches);
      }
    };
    const auto copy_v = [&](const Item& item, u32 tile) {
      const u32 batch = item.group / p.heads, head = item.group - batch * p.heads, key0 = begin_of(item) + tile * KEYS;
      v_ring.wait_empty(turn);
      u32 landed = v_ring.landed(turn);
      if (PACKED && is_cut(p, item, tile)) {
        barrier_arrive(landed);
        landed = cut_landed + 8 * (turn % STAGES);
      }
      if constexpr (ENDS) {
        const u32 keys = item.keys - tile * KEYS;
        VTile::bring_up_to<config::box>(keys, v_ring.tile(turn), p.map_v, Ends::v(p), landed, key0, head / p.heads_per_v);
      } else {
        barrier_arrive_expect(landed, VTile::BYTES);
        VTile::copy(v_ring.tile(turn), p.map_v, landed, key0, head / p.heads_per_v, batch * p.v_batches);
      }
      ++turn;
    };
    const auto copy_keys = [&](const Item& item, u32 tile) {
      copy_k(item, tile);
      copy_v(item, tile);
    };
    for (;; ++q_turn) {
      // The block's first item does not wait for the scout or the length, nor does its first tile of keys.
      const bool begun = (SKIPS || ASCENDING) && q_turn == 0;
      if (begun) {
        copy_q(first);
        if (ASCENDING) copy_k(first, 0);
        else copy_keys(first, 0);
      }
      Item item = take(q_turn);
      // What packed sequences take next is asked for only when the copies of this item are under way: who holds items that wait leaves
      // others without.
      if constexpr (SCOUT && !ENDS) barrier_arrive(scouted.empty);
      q_ring.wait_empty(q_turn);
      items[q_turn % Q_STAGES] = item;
      barrier_arrive(q_ring.landed(q_turn));
      if (item.tiles == 0) {
        barrier_arrive(q_ring.landed(q_turn));
        if constexpr (ENDS) barrier_arrive(scouted.empty);
        if (nothing_more(item)) break;
        continue;
      }
      if (begun && ASCENDING) copy_v(item, 0);
      if (begun) next_tile(item, item.tiles--);
      else copy_q(item);
#pragma unroll 1
      for (u32 left = item.tiles; left > 0; --left) {
        if (ENDS && left == 1) barrier_arrive(scouted.empty);
        copy_keys(item, next_tile(item, left));
      }
    }
    if (!SCOUT) no_more_items<config::dynamic>(p);
  }
  if (BIAS && warp == 1) {
    // As the copier's, the first tile of the block's first item does not wait for the scout: it is an item of its own.
    Item item = first;
    item.tiles = item.live = 1;
#pragma unroll 1
    for (bool begun = SKIPS;; begun = false) {
      if (!begun) {
        item = take(q_turn);
        if constexpr (SCOUT) barrier_arrive(scouted.empty);
        if (item.tiles == 0) break;
        if (SKIPS && q_turn == 0) next_tile(item, item.tiles--);
        ++q_turn;
      }
      const u32 batch = item.group / p.heads, head = item.group - batch * p.heads;
#pragma unroll 1
      for (u32 left = item.tiles; left > 0; --left, ++turn) {
        float bias[KEYS / 32];
        key_biases(p, batch, head, next_tile(item, left) * KEYS, bias);
        k_ring.wait_empty(turn);
#pragma unroll
        for (int i = 0; i < KEYS / 32; ++i) biases[turn % STAGES * KEYS + 32 * i + lane] = bias[i];
        barrier_arrive(k_ring.landed(turn));
      }
    }
  }
  if (PACKED && warp == 1) {
    u32 cut_phases = 0;  // a bit for each place of the ring
#pragma unroll 1
    for (;; ++q_turn) {
      Item item = take(q_turn);
      if constexpr (SCOUT) barrier_arrive(scouted.empty);
      if (nothing_more(item)) break;
#pragma unroll 1
      for (u32 left = item.tiles; left > 0; --left, ++turn) {
        const u32 tile = next_tile(item, left);
        v_ring.wait_empty(turn);
        if (is_cut(p, item, tile)) {
          const u32 stage = turn % STAGES, kept = keys_of(p, item) - tile * KEYS;
          barrier_wait(cut_landed + 8 * stage, cut_phases >> stage & 1);
          cut_phases ^= 1u << stage;
#pragma unroll 1
          for (u32 panel = 0; panel < VTile::PANELS; ++panel)
#pragma unroll 1
            for (u32 at = kept * VTile::ROW_BYTES + 16 * lane; at < VTile::PITCH; at += 512)
              *reinterpret_cast<uint4*>(shared + V_RING + stage * VTile::BYTES + panel * VTile::PITCH + at) = uint4{0, 0, 0, 0};
          shared_writes_fence();
        }
        barrier_arrive(v_ring.landed(turn));
      }
    }
  }
  if (SCOUT && warp == 2) {
    u32 place = 0;
#pragma unroll 1
    for (u32 item_turn = 0;; ++item_turn) {
      // An item is taken only when the one before it has been begun: who takes them too early leaves others without.
      scouted.wait_empty(item_turn);
      if (item_turn > 0) {
        u32 next = 0;
        if (lane == 0) next = item_after<config::dynamic>(p, index);
        index = __shfl_sync(~0u, next, 0);
      }
      Item item = first;
      if (PACKED && !SINGLE) item = packed_item(p, places, index, place);
      else if (item_turn > 0) item = index < end ? item_of(p, index) : Item{};
      if (SINGLE && index < end) item = single_item(p, item, length);
      if (SKIPS && item.tiles > 0) {
        const u32 batch = item.group / p.heads;
        item.live = live_tiles(p, item, batch, item.group - batch * p.heads);
        if (item_turn == 0) item.live |= 1;  // already under way
        item.tiles = __popc(item.live);
      }
      if (lane == 0) {
        items[Q_STAGES] = item;
        barrier_arrive(scouted.full);
      }
      if (nothing_more(item)) break;
    }
    if (lane == 0) no_more_items<config::dynamic>(p);
  }
}
