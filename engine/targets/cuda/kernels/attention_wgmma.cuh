// Attention for sm_90a: softmax(scale · q kᵀ + bias) v with fp16 or bf16 operands that the copy engine can read, fp32 sums; a bias is
// one number a key, or (FULL) one a score. Persistent and warp-specialised: the last warpgroup takes items (a tile of queries of one
// head) and keeps rings of tiles of q, k and v filled through TMA, and of the biases beside k; CONSUMERS warpgroups own 64 queries each.
// Keys are taken KEYS at a time, from the last to the first, with a running maximum and a running sum. Probabilities stay in registers,
// as operand A of the product with v. The scores of a tile are computed while the probabilities of the one before meet v.
// With a bias by key three warps of the last warpgroup share its work, so that no copy waits for a load: the scout takes items and finds
// out which tiles of keys can matter, one item ahead; the copier starts copies; another brings the biases of the same tiles.
// PACKED: sequences lie one after the other. The scout finds out which piece comes next; the third warp makes zeros of what a tile of v
// has beyond the end of its sequence: its probabilities are 0, but 0 · NaN is NaN, and what one sequence holds must not reach another.
// NOTES: what a warpgroup does to the rings must not depend on which one it is, or descriptors leave the uniform registers.
// `Bias` and `FullBias` come from attention_operands.py and attention_wgmma.py.
#pragma once
#include "epilogue/fragment.cuh"
#include "epilogue/math.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/barrier.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "ptx/pack.cuh"
#include "ptx/tma_outer.cuh"
#include "ptx/wgmma_panels.cuh"
#include "scheduler/counter.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int HEAD = config::head_padded, VALUE = config::value_padded, KEYS = config::keys;
constexpr int HEAD_PANELS = (HEAD + 31) / 32 * 32;  // the features of q and k in shared memory
constexpr int CONSUMERS = config::consumers, QUERIES = 64 * CONSUMERS, STAGES = config::stages, Q_STAGES = config::q_stages;
// BIAS: one number a key. FULL: one a score.
constexpr bool CAUSAL = config::causal, BIAS = config::bias == 1, FULL = config::bias == 2, TURNS = config::turns && CONSUMERS > 1;
constexpr bool PACKED = config::packed;
static_assert(!PACKED || config::bias == 0, "packed sequences have no bias");
// SKIPS: tiles of keys may be left out, which are then taken from the first to the last. SCOUT: items come from the scout; where a
// block has one and nothing is skipped, each warp finds it by itself.
constexpr bool SKIPS = config::skips, SCOUT = PACKED || SKIPS || (BIAS && config::dynamic);
constexpr bool HELPERS = BIAS || PACKED;  // the producer is three warps
constexpr int THREADS = 128 * (CONSUMERS + 1), WARPS = 4 * CONSUMERS;
constexpr int PRODUCER_REGISTERS = config::producer_registers, CONSUMER_REGISTERS = config::consumer_registers;
// Heads of a band, whose tiles of queries are dealt from the longest to the shortest, so that what comes last is short. Without a causal
// mask all are alike, and those of a head stay together, because they read the same k and v.
constexpr int GROUPS = CAUSAL ? config::band : 1;
static_assert(!BIAS || KEYS % 32 == 0, "the lanes of a warp load the biases of a tile");
static_assert(!SKIPS || (BIAS && !CAUSAL), "only biases tell what can be skipped, from the first tile on");
constexpr float GROWTH = 8.0f;  // by how many powers of two a maximum is exceeded before it is replaced (see `exponentials`)

#include "attention_biases.cuh"
#include "attention_items.cuh"
#include "attention_packed.cuh"

// A tile in shared memory: panels of 64 features, or 32 where they do not come out even, each of ROWS rows of ROW_BYTES.
template <int ROWS, int FEATURES> struct Tile {
  static constexpr int PANEL = FEATURES % 64 ? 32 : 64, ROW_BYTES = PANEL * 2, PITCH = ROWS * ROW_BYTES;
  static constexpr int PANELS = FEATURES / PANEL, BYTES = PANELS * PITCH;
  static_assert(FEATURES % PANEL == 0 && PITCH % 1024 == 0, "panels start at a swizzle atom");

  DEVICE static void copy(u32 tile, const TensorMap& map, u32 landed, u32 row, u32 head, u32 batch) {
#pragma unroll
    for (int i = 0; i < PANELS; ++i) copy_box(tile + i * PITCH, map, landed, i * PANEL, row, head, batch);
  }
};
using QTile = Tile<QUERIES, HEAD_PANELS>;
using KTile = Tile<KEYS, HEAD_PANELS>;
using VTile = Tile<KEYS, VALUE>;

// Shared memory: q tiles, rings of k and of v, the biases beside each k, the item of each q and the scout's, the order of packed sequences,
// barriers. As in attention_wgmma.py.
constexpr int K_RING = Q_STAGES * QTile::BYTES, V_RING = K_RING + STAGES * KTile::BYTES, BIASES = V_RING + STAGES * VTile::BYTES;
constexpr int ITEMS = BIASES + STAGES * (BIAS ? KEYS * 4 : BiasTile::BYTES), PLACES = ITEMS + sizeof(Item) * (Q_STAGES + HELPERS);
constexpr int BARRIERS = PLACES + (PACKED ? 8 * (config::places + 16) : 0);
static_assert(BARRIERS + 8 * (2 * (Q_STAGES + HELPERS) + (4 + PACKED) * STAGES) == config::shared_bytes, "the host asks for as much");

// A ring of tiles: which is `turn`'s, and the parity of its phase. A fresh barrier counts as completed in the phase before its first.
template <int DEPTH> struct Ring {
  u32 tiles, bytes, full, empty;
  DEVICE u32 tile(u32 turn) const { return tiles + turn % DEPTH * bytes; }
  DEVICE u32 landed(u32 turn) const { return full + 8 * (turn % DEPTH); }
  DEVICE void wait_full(u32 turn) const { barrier_wait(full + 8 * (turn % DEPTH), turn / DEPTH & 1); }
  DEVICE void wait_empty(u32 turn) const { barrier_wait(empty + 8 * (turn % DEPTH), turn / DEPTH & 1 ^ 1); }
  // Called by all lanes of a warp.
  DEVICE void leave(u32 turn) const {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) barrier_arrive(empty + 8 * (turn % DEPTH));
  }
  // Each lane for itself, of what all of them have read.
  DEVICE void leave_each(u32 turn) const { barrier_arrive(empty + 8 * (turn % DEPTH)); }
};

// The scores of a tile of keys become exponentials. A maximum stays while no lane of the warp exceeds it by more than GROWTH: exponentials
// and their sum may then be 2^GROWTH too large alike. True where it was replaced: what was summed up before has to be multiplied
// with `correction`. `masked`: the tile has keys that some query must not see. `bias_tile`: the biases of its scores, of which this
// lane's begin at `bias_start`.
DEVICE bool exponentials(
    const Params& p, float (&s)[KEYS / 2], const float* biases, const u8* bias_tile, u32 bias_start, bool masked, u32 keys, u32 key0,
    u32 query, float (&maximum)[2], float (&sum)[2], float (&correction)[2]) {
  const u32 quad = threadIdx.x & 3;
  if constexpr (BIAS) {
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) s[i] = fmaf(s[i], p.scale_log2, biases[i / 4 * 8 + quad * 2 + (i & 1)]);
  }
  if constexpr (FULL) {
#pragma unroll
    for (int i = 0; i < KEYS / 8; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto pair = BiasTile::pair(bias_tile, bias_start, i, h);
        s[4 * i + 2 * h] = fmaf(s[4 * i + 2 * h], p.scale_log2, bias_log2(pair.x));
        s[4 * i + 2 * h + 1] = fmaf(s[4 * i + 2 * h + 1], p.scale_log2, bias_log2(pair.y));
      }
    }
  }
  if (masked) {
    // Keys that the lane's first query sees, counted from its first column of the tile; of the other it sees 8 more.
    const u32 end = CAUSAL ? min(keys, query + 1) : keys, lower_end = CAUSAL ? min(keys, query + 9) : keys;
    const int seen = static_cast<int>(end - key0 - quad * 2), lower_seen = static_cast<int>(lower_end - key0 - quad * 2);
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i)
      if (i / 4 * 8 + (i & 1) >= (i & 2 ? lower_seen : seen)) s[i] = -INFINITY;
  }
  // Without a bias the scale, which is positive, meets the scores in the exponential only.
  const float scale = BIAS || FULL ? 1.0f : p.scale_log2;
  float highest[2], shift[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    highest[h] = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
    for (int i = 4; i < KEYS / 2; i += 4) highest[h] = fmaxf(highest[h], fmaxf(s[i + 2 * h], s[i + 2 * h + 1]));
    highest[h] = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], 1));
    highest[h] = fmaxf(highest[h], __shfl_xor_sync(~0u, highest[h], 2));
  }
  const auto shift_of = [&](float m) { return m == -INFINITY ? 0.0f : m * scale; };  // of a row masked so far every exponential is 0, not NaN
  const bool grown = __any_sync(~0u, (highest[0] - maximum[0]) * scale > GROWTH || (highest[1] - maximum[1]) * scale > GROWTH);
  if (grown) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float m = fmaxf(maximum[h], highest[h]);
      correction[h] = exp2_approx(fmaf(maximum[h], scale, -shift_of(m)));
      maximum[h] = m;
      sum[h] *= correction[h];
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) shift[h] = shift_of(maximum[h]);
#pragma unroll
  for (int i = 0; i < KEYS / 2; ++i) {
    s[i] = exp2_approx(BIAS || FULL ? s[i] - shift[i >> 1 & 1] : fmaf(s[i], scale, -shift[i >> 1 & 1]));
    sum[i >> 1 & 1] += s[i];
  }
  return grown;
}

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = shared_address(shared), barriers = base + BARRIERS;
  const Ring<Q_STAGES> q_ring{base, QTile::BYTES, barriers, barriers + 8 * Q_STAGES};
  const Ring<1> scouted{0, 0, barriers + 16 * Q_STAGES, barriers + 16 * Q_STAGES + 8};  // the item behind those of q
  const u32 kv_barriers = barriers + 16 * (Q_STAGES + HELPERS);
  const Ring<STAGES> k_ring{base + K_RING, KTile::BYTES, kv_barriers, kv_barriers + 8 * STAGES};
  const Ring<STAGES> v_ring{base + V_RING, VTile::BYTES, kv_barriers + 16 * STAGES, kv_barriers + 24 * STAGES};
  const u32 cut_landed = kv_barriers + 32 * STAGES;  // a tile of v of which the end belongs to others, before it is zeros
  float* const biases = reinterpret_cast<float*>(shared + BIASES);
  Item* const items = reinterpret_cast<Item*>(shared + ITEMS);
  const u32 warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(p.map_q);
    prefetch_tensor_map(p.map_k);
    prefetch_tensor_map(p.map_v);
    for (int i = 0; i < Q_STAGES; ++i) {
      barrier_init(q_ring.full + 8 * i, 2);  // the item is known, and q has landed
      barrier_init(q_ring.empty + 8 * i, 32 * WARPS);
    }
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(k_ring.full + 8 * i, BIAS ? 33 : 1);  // each lane that brings biases arrives for what it wrote
      barrier_init(k_ring.empty + 8 * i, BIAS ? 32 * WARPS : WARPS);
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
  __syncthreads();
  let_next_kernel_start();

  u32 turn = 0, q_turn = 0;  // of the rings
  if (warpgroup == CONSUMERS) {
    give_registers<PRODUCER_REGISTERS>();
    const u32 warp = threadIdx.x / 32 & 3, lane = threadIdx.x & 31;
    const u32 end = (p.queries + QUERIES - 1) / QUERIES * p.groups;
    u32 index = blockIdx.x;
    const Item first = PACKED ? Item{} : item_of(p, index);
    wait_for_previous_kernel();
    // The next item, for the copier and the warp of the biases. Without a scout the one behind it is asked for at once.
    const auto take = [&](u32 item_turn) -> Item {
      if constexpr (SCOUT) {
        scouted.wait_full(item_turn);
        return items[Q_STAGES];
      }
      if (index >= end) return {};
      const Item item = item_turn == 0 ? first : item_of(p, index);
      index = item_after<config::dynamic>(p, index);
      return item;
    };
    if (warp == 0 && lane == 0) {
      const auto copy_q = [&](const Item& item) {
        const u32 batch = item.group / p.heads, head = item.group - batch * p.heads;
        barrier_arrive_expect(q_ring.landed(q_turn), QTile::BYTES);
        QTile::copy(q_ring.tile(q_turn), p.map_q, q_ring.landed(q_turn), begin_of(item) + item.query0, head, batch * p.q_batches);
      };
      const auto copy_keys = [&](const Item& item, u32 tile) {
        const u32 batch = item.group / p.heads, head = item.group - batch * p.heads, key0 = begin_of(item) + tile * KEYS;
        k_ring.wait_empty(turn);
        barrier_arrive_expect(k_ring.landed(turn), KTile::BYTES + BiasTile::BYTES);
        if (FULL) {
          const u32 biases_of_tile = base + BIASES + turn % STAGES * BiasTile::BYTES;
          BiasTile::copy(biases_of_tile, p, k_ring.landed(turn), tile * KEYS, item.query0, head * p.bias_heads, batch * p.bias_batches);
        }
        KTile::copy(k_ring.tile(turn), p.map_k, k_ring.landed(turn), key0, head / p.heads_per_k, batch * p.k_batches);
        v_ring.wait_empty(turn);
        u32 landed = v_ring.landed(turn);
        if (PACKED && is_cut(p, item, tile)) {
          barrier_arrive(landed);
          landed = cut_landed + 8 * (turn % STAGES);
        }
        barrier_arrive_expect(landed, VTile::BYTES);
        VTile::copy(v_ring.tile(turn), p.map_v, landed, key0, head / p.heads_per_v, batch * p.v_batches);
        ++turn;
      };
      for (;; ++q_turn) {
        const bool begun = SKIPS && q_turn == 0;  // the block's first item does not wait for the scout, nor does its first tile of keys
        if (begun) {
          copy_q(first);
          copy_keys(first, 0);
        }
        Item item = take(q_turn);
        if constexpr (SCOUT) barrier_arrive(scouted.empty);
        q_ring.wait_empty(q_turn);
        items[q_turn % Q_STAGES] = item;
        barrier_arrive(q_ring.landed(q_turn));
        if (item.tiles == 0) {
          barrier_arrive(q_ring.landed(q_turn));
          if (nothing_more(item)) break;
          continue;
        }
        if (begun) next_tile(item, item.tiles--);
        else copy_q(item);
#pragma unroll 1
        for (u32 left = item.tiles; left > 0; --left) copy_keys(item, next_tile(item, left));
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
        const Item item = take(q_turn);
        barrier_arrive(scouted.empty);
        if (nothing_more(item)) break;
#pragma unroll 1
        for (u32 left = item.tiles; left > 0; --left, ++turn) {
          v_ring.wait_empty(turn);
          if (is_cut(p, item, left - 1)) {
            const u32 stage = turn % STAGES, kept = keys_of(p, item) - (left - 1) * KEYS;
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
      Place* const places = reinterpret_cast<Place*>(shared + PLACES);
      if (PACKED) sort_sequences(p, places, reinterpret_cast<u32*>(places + config::places));
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
        if (PACKED) item = packed_item(p, places, index, place);
        else if (item_turn > 0) item = index < end ? item_of(p, index) : Item{};
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
  } else {
    take_registers<CONSUMER_REGISTERS>();
    wait_for_previous_kernel();
    stamp_begin(p.stamp);
    const u32 local_row = threadIdx.x / 32 % 4 * 16 + (threadIdx.x & 31) / 4;  // of the warpgroup's 64, and the one 8 below
    float s[KEYS / 2], out[VALUE / 2];
    u32 probabilities[KEYS / 4];
    const auto begin_scores = [&](u64 q, u32 turn) {
      const u64 k = panel_descriptor<KTile::ROW_BYTES>(k_ring.tile(turn), KTile::PITCH);
      constexpr int STEPS = KTile::ROW_BYTES / 32;  // of a panel
      // NOTES: the descriptors of a wide head do not fit the uniform registers all at once, so its panels are a loop; each is a group,
      // or NVRTC 13.0 puts a `warpgroup.arrive` behind the loop.
      constexpr int ALL = HEAD / 16, TOGETHER = ALL > 8 ? STEPS : ALL;
      static_assert(ALL % TOGETHER == 0, "whole panels");
#pragma unroll 1
      for (int panel = 0; panel < ALL / TOGETHER; ++panel) {
        const u64 q_panel = q + panel * (QTile::PITCH >> 4), k_panel = k + panel * (KTile::PITCH >> 4);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i)
          wgmma<KEYS, Element>(
              s, q_panel + i / STEPS * (QTile::PITCH >> 4) + i % STEPS * 2, k_panel + i / STEPS * (KTile::PITCH >> 4) + i % STEPS * 2,
              i > 0 || panel > 0);
        wgmma_commit();
      }
    };
    const auto begin_values = [&](u32 turn, bool first) {
      const u64 v = panel_descriptor<VTile::ROW_BYTES>(v_ring.tile(turn), VTile::PITCH);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < KEYS / 16; ++i)
        wgmma<VALUE, Element>(out, *reinterpret_cast<const u32(*)[4]>(&probabilities[4 * i]), v + i * (16 * VTile::ROW_BYTES >> 4), i > 0 || !first);
      wgmma_commit();
    };
    // The accumulators of 16 keys are, rounded, operand A.
    const auto round_probabilities = [&] {
#pragma unroll
      for (int i = 0; i < KEYS / 4; ++i) probabilities[i] = pack_pair<Element>(s[2 * i], s[2 * i + 1]);
    };

    // A place of the keys has their biases, too, which every lane has read; the keys themselves are read by the warp's products.
    const auto leave_keys = [&](u32 turn) {
      if constexpr (BIAS) k_ring.leave_each(turn);
      else k_ring.leave(turn);
    };

    // Consumers take turns to start products, so that one computes exponentials while another multiplies.
    const auto take_turn = [&] { if constexpr (TURNS) meet_at<256>(1 + warpgroup); };
    const auto pass_turn = [&] { if constexpr (TURNS) pass_by<256>(warpgroup + 1 == CONSUMERS ? 1 : 2 + warpgroup); };
    if (TURNS && warpgroup == CONSUMERS - 1) pass_by<256>(1);

    for (;; ++q_turn) {
      q_ring.wait_full(q_turn);
      Item item = items[q_turn % Q_STAGES];
      item.query0 = __shfl_sync(~0u, item.query0, 0);
      item.group = __shfl_sync(~0u, item.group, 0);
      item.tiles = __shfl_sync(~0u, item.tiles, 0);
      if (PACKED) {
        item.begin = __shfl_sync(~0u, item.begin, 0);
        item.rows = __shfl_sync(~0u, item.rows, 0);
        item.keys = __shfl_sync(~0u, item.keys, 0);
      }
      if (nothing_more(item)) break;
      const u32 rows = rows_of(p, item), keys = keys_of(p, item), first_row = item.group * p.queries + begin_of(item);
      const u32 first_query = item.query0 + 64 * warpgroup, query = first_query + local_row, hidden = hidden_tiles(p, item, first_query);
#pragma unroll 1
      for (u32 i = 0; i < hidden; ++i) {
        k_ring.wait_full(turn + i);
        take_turn();
        pass_turn();
        leave_keys(turn + i);
        v_ring.wait_full(turn + i);
        v_ring.leave(turn + i);
      }
      if (hidden < item.tiles) {
        float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {}, correction[2];
        const u64 q = panel_descriptor<QTile::ROW_BYTES>(q_ring.tile(q_turn) + warpgroup * 64 * QTile::ROW_BYTES, QTile::PITCH);
        const u32 last = turn + item.tiles - 1;
        const u32 bias_start = BiasTile::start(warpgroup * 64 + local_row);
        // The tile of `t`, a turn.
        const auto soften = [&](u32 t) {
          const u32 key0 = (last - t) * KEYS;
          // A bias hides the keys past the end itself.
          const bool masked = (!BIAS && key0 + KEYS > keys) || (CAUSAL && key0 + KEYS > first_query + 1);
          const u8* const bias_tile = shared + BIASES + t % STAGES * BiasTile::BYTES;
          return exponentials(p, s, biases + t % STAGES * KEYS, bias_tile, bias_start, masked, keys, key0, query, maximum, sum, correction);
        };
        const u32 first = turn + hidden;
        k_ring.wait_full(first);
        take_turn();
        begin_scores(q, first);
        pass_turn();
        wgmma_wait<0>();
        wgmma_settle(s);
        if constexpr (!BIAS && !FULL) leave_keys(first);
        soften(first);
        if constexpr (BIAS || FULL) leave_keys(first);  // a place of the ring has the biases of its keys, too
        round_probabilities();
#pragma unroll 1
        for (u32 t = first + 1; t <= last; ++t) {
          k_ring.wait_full(t);
          take_turn();
          begin_scores(q, t);
          v_ring.wait_full(t - 1);
          begin_values(t - 1, t == first + 1);
          pass_turn();
          wgmma_wait<1>();
          wgmma_settle(s);
          if constexpr (!BIAS && !FULL) leave_keys(t);
          const bool grown = soften(t);
          if constexpr (BIAS || FULL) leave_keys(t);
          wgmma_wait<0>();
          wgmma_settle(out);
          wgmma_keep(probabilities);
          v_ring.leave(t - 1);
          if (grown) {
#pragma unroll
            for (int i = 0; i < VALUE / 2; ++i) out[i] *= correction[i >> 1 & 1];
          }
          round_probabilities();
        }
        q_ring.leave_each(q_turn);  // the next tile of queries comes while this one's results go
        v_ring.wait_full(last);
        begin_values(last, first == last);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
          sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
          // With every key masked 0 / 0 gives the NaN that the softmax gives, unless the operator asks for zeros.
          sum[h] = config::masked_rows_zero && sum[h] == 0.0f ? 0.0f : 1.0f / sum[h];
        }
        wgmma_wait<0>();
        wgmma_settle(out);
        wgmma_keep(probabilities);
        v_ring.leave(last);
#pragma unroll
        for (int i = 0; i < VALUE / 2; ++i) out[i] *= sum[i >> 1 & 1];
        emit_fragment<Epilogue, VALUE / 8, 2>(p, out, first_row, query, rows, 0, p.value_size);
      } else {
        q_ring.leave_each(q_turn);
        if (PACKED && item.tiles == 0) {
#pragma unroll
          for (int i = 0; i < VALUE / 2; ++i) out[i] = 0.0f;
          emit_fragment<Epilogue, VALUE / 8, 2>(p, out, first_row, query, rows, 0, p.value_size);
        }
      }
      turn += item.tiles;
    }
  }
  stamp_end(p.stamp, threadIdx.x % 128 == 0);  // the producer is through long before the consumers
}
