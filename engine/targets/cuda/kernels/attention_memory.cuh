// The shared memory of attention_wgmma.cuh: tiles of q, k and v, the biases beside k, items, and the rings of barriers between producer
// and consumers. Included there behind the constants.
#pragma once
#include "attention_biases.cuh"
#include "attention_items.cuh"
#include "attention_rings.cuh"
#include "ptx/memory.cuh"

using QTile = Tile<QUERIES, HEAD_PANELS>;
using KTile = Tile<KEYS, HEAD_PANELS>;
using VTile = Tile<KEYS, VALUE>;

// Shared memory: q tiles, rings of k and of v, the biases beside each k, the item of each q and the scout's, the order of packed sequences,
// barriers. As in attention_wgmma.py.
constexpr int K_RING = Q_STAGES * QTile::BYTES, V_RING = K_RING + STAGES * KTile::BYTES, BIASES = V_RING + STAGES * VTile::BYTES;
constexpr int ITEMS = BIASES + STAGES * (BIAS ? KEYS * 4 : BiasTile::BYTES), PLACES = ITEMS + sizeof(Item) * (Q_STAGES + HELPERS);
constexpr int BARRIERS = PLACES + (PACKED && !SINGLE ? 8 * (config::places + 16) : 0);
static_assert(BARRIERS + 8 * (2 * (Q_STAGES + HELPERS) + (4 + PACKED) * STAGES) == config::shared_bytes, "the host asks for as much");

// Where all of it lies in a block.
struct Memory {
  u8* shared;
  u32 base;
  Ring<Q_STAGES> q_ring;
  Ring<1> scouted;  // the item behind those of q
  Ring<STAGES> k_ring, v_ring;
  u32 cut_landed;  // a tile of v whose end is still to become zeros
  float* biases;
  Item* items;

  DEVICE explicit Memory(u8* shared) : shared(shared), base(shared_address(shared)) {
    const u32 barriers = base + BARRIERS, kv_barriers = barriers + 16 * (Q_STAGES + HELPERS);
    q_ring = {base, QTile::BYTES, barriers, barriers + 8 * Q_STAGES};
    scouted = {0, 0, barriers + 16 * Q_STAGES, barriers + 16 * Q_STAGES + 8};
    k_ring = {base + K_RING, KTile::BYTES, kv_barriers, kv_barriers + 8 * STAGES};
    v_ring = {base + V_RING, VTile::BYTES, kv_barriers + 16 * STAGES, kv_barriers + 24 * STAGES};
    cut_landed = kv_barriers + 32 * STAGES;
    biases = reinterpret_cast<float*>(shared + BIASES);
    items = reinterpret_cast<Item*>(shared + ITEMS);
  }

  // By one thread, before the block meets.
  DEVICE void init_barriers() const {
    for (int i = 0; i < Q_STAGES; ++i) {
      barrier_init(q_ring.full + 8 * i, 2);  // the item is known, and q has landed
      barrier_init(q_ring.empty + 8 * i, 32 * WARPS);
    }
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(k_ring.full + 8 * i, BIAS ? 33 : 1);  // each lane that brings biases arrives for what it wrote
      barrier_init(k_ring.empty + 8 * i, WARPS);
      barrier_init(v_ring.full + 8 * i, PACKED ? 33 : 1);
      if constexpr (PACKED) barrier_init(cut_landed + 8 * i, 1);
      barrier_init(v_ring.empty + 8 * i, WARPS);
    }
    if constexpr (HELPERS) {
      barrier_init(scouted.full, 1);
      barrier_init(scouted.empty, 33);  // the copier, and every lane of the warp that brings biases or zeros
    }
    barrier_init_fence();
  }
};
