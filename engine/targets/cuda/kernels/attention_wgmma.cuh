// Attention for sm_90a: softmax(scale · q kᵀ + bias) v with fp16 or bf16 operands that the copy engine can read, fp32 sums; a bias is
// one number a key. Persistent and warp-specialised: the last warpgroup keeps rings of tiles of q, k and v filled through TMA, and of the
// biases beside k; CONSUMERS warpgroups own 64 queries each. Keys are taken KEYS at a time, from the last to
// the first, with a running maximum and a running sum. Probabilities stay in registers, as operand A of the product with v. The
// scores of a tile are computed while the probabilities of the one before meet v.
// NOTES: what a warpgroup does to the rings must not depend on which one it is, or descriptors leave the uniform registers.
// `Bias` comes from attention.py.
#pragma once
#include "epilogue/fragment.cuh"
#include "epilogue/math.cuh"
#include "ptx/barrier.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "ptx/pack.cuh"
#include "ptx/tma_outer.cuh"
#include "ptx/wgmma_panels.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int HEAD = config::head_padded, VALUE = config::value_padded, KEYS = config::keys;
constexpr int CONSUMERS = config::consumers, QUERIES = 64 * CONSUMERS, STAGES = config::stages, Q_STAGES = 2;
constexpr bool CAUSAL = config::causal, BIAS = config::bias;
constexpr int THREADS = 128 * (CONSUMERS + 1), WARPS = 4 * CONSUMERS;
constexpr int PRODUCER_REGISTERS = config::producer_registers, CONSUMER_REGISTERS = config::consumer_registers;
constexpr int GROUPS = CAUSAL ? 32 : 1;  // heads of a band, whose tiles are dealt from the longest to the shortest

// A tile in shared memory: panels of up to 64 features, each of ROWS rows of ROW_BYTES.
template <int ROWS, int FEATURES> struct Tile {
  static constexpr int PANEL = FEATURES < 64 ? FEATURES : 64, ROW_BYTES = PANEL * 2, PITCH = ROWS * ROW_BYTES;
  static constexpr int PANELS = FEATURES / PANEL, BYTES = PANELS * PITCH;
  static_assert(FEATURES % PANEL == 0 && PITCH % 1024 == 0, "panels start at a swizzle atom");

  DEVICE static void copy(u32 tile, const TensorMap& map, u32 landed, u32 row, u32 head, u32 batch) {
#pragma unroll
    for (int i = 0; i < PANELS; ++i) copy_box(tile + i * PITCH, map, landed, i * PANEL, row, head, batch);
  }
};
using QTile = Tile<QUERIES, HEAD>;
using KTile = Tile<KEYS, HEAD>;
using VTile = Tile<KEYS, VALUE>;

// Shared memory: q tiles, rings of k and of v, the biases of each k, barriers. As in attention_wgmma.py.
constexpr int K_RING = Q_STAGES * QTile::BYTES, V_RING = K_RING + STAGES * KTile::BYTES, BIASES = V_RING + STAGES * VTile::BYTES;
constexpr int BARRIERS = BIASES + STAGES * KEYS * 4;
static_assert(BARRIERS + 8 * (2 * Q_STAGES + 4 * STAGES) == config::shared_bytes, "the host asks for tiles, biases and barriers");

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
};

struct Item { u32 query0, head, batch, tiles; };  // a tile of queries of one head, and how many tiles of keys it meets

DEVICE Item item_of(const Params& p, u32 index) {
  const u32 query_tiles = (p.queries + QUERIES - 1) / QUERIES, per_band = GROUPS * query_tiles;
  const u32 band = index / per_band, within = index - band * per_band, groups = min(static_cast<u32>(GROUPS), p.groups - band * GROUPS);
  const u32 group = band * GROUPS + within % groups, query0 = (query_tiles - 1 - within / groups) * QUERIES;
  const u32 batch = group / p.heads, keys = CAUSAL ? min(p.keys, query0 + QUERIES) : p.keys;
  return {query0, group - batch * p.heads, batch, (keys + KEYS - 1) / KEYS};
}

// In units of log2. A finite bias stays finite, so that a row of equal, very negative ones is uniform, not empty.
DEVICE float bias_log2(float bias) { return bias == -INFINITY ? bias : fmaxf(bias * 1.4426950408889634f, -1e38f); }

// The scores of a tile of keys become exponentials; `correction` is what earlier ones have to be multiplied with. MASKED: the tile has
// keys that some query must not see.
template <bool MASKED>
DEVICE void exponentials(const Params& p, float (&s)[KEYS / 2], const float* biases, u32 key0, u32 query, float (&maximum)[2], float (&sum)[2], float (&correction)[2]) {
  const u32 quad = threadIdx.x & 3;
  float shift[2], highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < KEYS / 2; ++i) {
    const u32 column = i / 4 * 8 + quad * 2 + (i & 1), key = key0 + column;
    if constexpr (BIAS) s[i] = fmaf(s[i], p.scale_log2, biases[column]);
    if (MASKED && (key >= p.keys || (CAUSAL && key > query + (i & 2 ? 8 : 0)))) s[i] = -INFINITY;
    highest[i >> 1 & 1] = fmaxf(highest[i >> 1 & 1], s[i]);
  }
  // Without a bias the scale, which is positive, meets the scores in the exponential only.
  const float scale = BIAS ? 1.0f : p.scale_log2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float m = highest[h];
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
    m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
    m = fmaxf(m, maximum[h]);
    shift[h] = m == -INFINITY ? 0.0f : m * scale;  // a row masked so far: every exponential is then 0, not NaN
    correction[h] = exp2_approx(fmaf(maximum[h], scale, -shift[h]));
    maximum[h] = m;
    sum[h] *= correction[h];
  }
#pragma unroll
  for (int i = 0; i < KEYS / 2; ++i) {
    s[i] = exp2_approx(BIAS ? s[i] - shift[i >> 1 & 1] : fmaf(s[i], scale, -shift[i >> 1 & 1]));
    sum[i >> 1 & 1] += s[i];
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = shared_address(shared), barriers = base + BARRIERS;
  const Ring<Q_STAGES> q_ring{base, QTile::BYTES, barriers, barriers + 8 * Q_STAGES};
  const u32 kv_barriers = barriers + 16 * Q_STAGES;
  const Ring<STAGES> k_ring{base + K_RING, KTile::BYTES, kv_barriers, kv_barriers + 8 * STAGES};
  const Ring<STAGES> v_ring{base + V_RING, VTile::BYTES, kv_barriers + 16 * STAGES, kv_barriers + 24 * STAGES};
  float* const biases = reinterpret_cast<float*>(shared + BIASES);
  const u32 warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(p.map_q);
    prefetch_tensor_map(p.map_k);
    prefetch_tensor_map(p.map_v);
    for (int i = 0; i < Q_STAGES; ++i) {
      barrier_init(q_ring.full + 8 * i, 1);
      barrier_init(q_ring.empty + 8 * i, WARPS);
    }
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(k_ring.full + 8 * i, BIAS ? 33 : 1);  // with biases each lane of their warp arrives
      barrier_init(k_ring.empty + 8 * i, WARPS);
      barrier_init(v_ring.full + 8 * i, 1);
      barrier_init(v_ring.empty + 8 * i, WARPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 items = (p.queries + QUERIES - 1) / QUERIES * p.groups;
  u32 turn = 0, q_turn = 0;  // of the rings
  if (warpgroup == CONSUMERS) {
    give_registers<PRODUCER_REGISTERS>();
    // A warp each for q and k, for v and for biases: few registers are left to them.
    const u32 warp = threadIdx.x / 32 & 3, lane = threadIdx.x & 31;
    if (warp == 0 && lane == 0) {
      for (u32 index = blockIdx.x; index < items; index += gridDim.x, ++q_turn) {
        const Item item = item_of(p, index);
        q_ring.wait_empty(q_turn);
        barrier_arrive_expect(q_ring.landed(q_turn), QTile::BYTES);
        QTile::copy(q_ring.tile(q_turn), p.map_q, q_ring.landed(q_turn), item.query0, item.head, item.batch * p.q_batches);
        const u32 head = item.head / p.heads_per_k, batch = item.batch * p.k_batches;
        for (u32 tile = item.tiles; tile-- > 0; ++turn) {
          k_ring.wait_empty(turn);
          barrier_arrive_expect(k_ring.landed(turn), KTile::BYTES);
          KTile::copy(k_ring.tile(turn), p.map_k, k_ring.landed(turn), tile * KEYS, head, batch);
        }
      }
    } else if (warp == 1 && lane == 0) {
      for (u32 index = blockIdx.x; index < items; index += gridDim.x) {
        const Item item = item_of(p, index);
        const u32 head = item.head / p.heads_per_v, batch = item.batch * p.v_batches;
        for (u32 tile = item.tiles; tile-- > 0; ++turn) {
          v_ring.wait_empty(turn);
          barrier_arrive_expect(v_ring.landed(turn), VTile::BYTES);
          VTile::copy(v_ring.tile(turn), p.map_v, v_ring.landed(turn), tile * KEYS, head, batch);
        }
      }
    } else if (BIAS && warp == 2) {
      for (u32 index = blockIdx.x; index < items; index += gridDim.x) {
        const Item item = item_of(p, index);
        for (u32 tile = item.tiles; tile-- > 0; ++turn) {
          k_ring.wait_empty(turn);
#pragma unroll 1
          for (u32 local = lane; local < KEYS; local += 32) {
            const u32 key = tile * KEYS + local;
            biases[turn % STAGES * KEYS + local] = key < p.keys ? bias_log2(Bias::at(p, item.batch, item.head, 0, key)) : -INFINITY;
          }
          barrier_arrive(k_ring.landed(turn));
        }
      }
    }
  } else {
    take_registers<CONSUMER_REGISTERS>();
    const u32 local_row = threadIdx.x / 32 % 4 * 16 + (threadIdx.x & 31) / 4;  // of the warpgroup's 64, and the one 8 below
    float s[KEYS / 2], out[VALUE / 2];
    u32 probabilities[KEYS / 4];
    const auto begin_scores = [&](u64 q, u32 turn) {
      const u64 k = panel_descriptor<KTile::ROW_BYTES>(k_ring.tile(turn), KTile::PITCH);
      constexpr int STEPS = KTile::ROW_BYTES / 32;  // of a panel
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < HEAD / 16; ++i)
        wgmma<KEYS, Element>(s, q + i / STEPS * (QTile::PITCH >> 4) + i % STEPS * 2, k + i / STEPS * (KTile::PITCH >> 4) + i % STEPS * 2, i > 0);
      wgmma_commit();
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

    for (u32 index = blockIdx.x; index < items; index += gridDim.x, ++q_turn) {
      const Item item = item_of(p, index);
      const u32 query = item.query0 + 64 * warpgroup + local_row;
      float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {}, correction[2];
      q_ring.wait_full(q_turn);
      const u64 q = panel_descriptor<QTile::ROW_BYTES>(q_ring.tile(q_turn) + warpgroup * 64 * QTile::ROW_BYTES, QTile::PITCH);
      const auto soften = [&](u32 tile, u32 turn, bool ragged) {
        const float* b = biases + turn % STAGES * KEYS;
        const u32 key0 = tile * KEYS;
        if (ragged || (CAUSAL && key0 + KEYS > item.query0)) exponentials<true>(p, s, b, key0, query, maximum, sum, correction);
        else exponentials<false>(p, s, b, key0, query, maximum, sum, correction);
      };

      k_ring.wait_full(turn);
      begin_scores(q, turn);
      wgmma_wait<0>();
      wgmma_settle(s);
      soften(item.tiles - 1, turn, !BIAS && item.tiles * KEYS > p.keys);  // a bias hides the keys past the end itself
      k_ring.leave(turn);
      round_probabilities();
      for (u32 tile = item.tiles - 1; tile-- > 0; ++turn) {
        k_ring.wait_full(turn + 1);
        begin_scores(q, turn + 1);
        v_ring.wait_full(turn);
        begin_values(turn, tile + 2 == item.tiles);
        wgmma_wait<1>();
        wgmma_settle(s);
        soften(tile, turn + 1, false);
        k_ring.leave(turn + 1);
        wgmma_wait<0>();
        wgmma_settle(out);
        wgmma_keep(probabilities);
        v_ring.leave(turn);
#pragma unroll
        for (int i = 0; i < VALUE / 2; ++i) out[i] *= correction[i >> 1 & 1];
        round_probabilities();
      }
      q_ring.leave(q_turn);
      v_ring.wait_full(turn);
      begin_values(turn, item.tiles == 1);
      wgmma_wait<0>();
      wgmma_settle(out);
      wgmma_keep(probabilities);
      v_ring.leave(turn);
      ++turn;

#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        // With every key masked 0 / 0 gives the NaN that the softmax gives, unless the operator asks for zeros.
        const float scale = config::masked_rows_zero && sum[h] == 0.0f ? 0.0f : 1.0f / sum[h];
#pragma unroll
        for (int i = 0; i < VALUE / 2; ++i)
          if ((i >> 1 & 1) == h) out[i] *= scale;
      }
      const u32 group = item.batch * p.heads + item.head;
      emit_fragment<Epilogue, VALUE / 8, 2>(p, out, group * p.queries, query, p.queries, 0, p.value_size);
    }
  }
  stamp_end(p.stamp);
}
