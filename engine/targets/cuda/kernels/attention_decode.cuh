// Attention of few queries, on sm_90a, where keys and values are what has to be read: a decoder's next tokens, queries that pool a
// sequence. A tile is the queries of all heads that share keys and values (`together` of them), up to 64 rows: row r is query
// r % queries of head r / queries of the tile, so each key is read once for all of them. A block has one tile and a part of its keys,
// which a fifth warp brings through rings of tiles, by TMA; a warpgroup multiplies. Several blocks can share a tile (SPLIT): what
// they have is joined by attention_join.cuh, which describes it.
// A bias is added to the scores, in any layout. BIAS: one number a key, alike for all rows; the fifth warp brings it beside the keys, and
// leaves out tiles of keys which it hides. FULL: whatever else; lanes load their own, while keys are on their way.
// `Bias` comes from attention_operands.py.
#pragma once
#include "attention_key_biases.cuh"
#include "attention_rings.cuh"
#include "attention_running.cuh"
#include "epilogue/fragment.cuh"
#include "mma/tile.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/grid.cuh"
#include "scheduler/split_k.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int HEAD = config::head_padded, VALUE = config::value_padded, KEYS = config::keys, STAGES = config::stages, ROWS = 64;
constexpr int HEAD_PANELS = (HEAD + 31) / 32 * 32;  // the features of q and k in shared memory
constexpr bool CAUSAL = config::causal, BIAS = config::bias == 1, FULL = config::bias == 2, SPLIT = config::split;
constexpr int WARPS = 4, CONSUMERS = 32 * WARPS, THREADS = CONSUMERS + 32;
constexpr u32 NOTHING = ~0u;  // instead of a tile of keys
using QTile = Tile<ROWS, HEAD_PANELS>;
using KTile = Tile<KEYS, HEAD_PANELS>;
using VTile = Tile<KEYS, VALUE>;
static_assert(!BIAS || KEYS % 32 == 0, "the lanes of a warp load the biases of a tile");

#include "attention_products.cuh"

// Shared memory: q, rings of k and of v, the biases beside each k and which tile it is, barriers. As in attention_decode_tiles.py.
constexpr int K_RING = QTile::BYTES, V_RING = K_RING + STAGES * KTile::BYTES, BIASES = V_RING + STAGES * VTile::BYTES;
constexpr int TAKEN = BIASES + (BIAS ? STAGES * KEYS * 4 : 0), BARRIERS = (TAKEN + 4 * STAGES + 7) / 8 * 8;
static_assert(BARRIERS + 32 * STAGES == config::shared_bytes, "the host asks for as much");

// What a block has to do: the heads of `batch` from `head` on, and the tiles of keys from `first` to `end`.
struct Share {
  u32 tile, split, batch, head, first, end;
  DEVICE explicit Share(const Params& p) {
    const u32 splits = splits_of<SPLIT>(p), keys = CAUSAL ? min(p.keys, p.queries) : p.keys, tiles = (keys + KEYS - 1) / KEYS;
    // Neighbouring blocks read the same keys, where the heads that share them are several tiles.
    const u32 rest = blockIdx.x / p.tiles_per_key, first_head = (rest / splits * p.tiles_per_key + blockIdx.x % p.tiles_per_key) * p.together;
    tile = first_head / p.together;
    split = rest % splits;
    batch = first_head / p.heads;
    head = first_head - batch * p.heads;
    first = tiles * split / splits;
    end = tiles * (split + 1) / splits;
  }
};

struct Memory {
  u8* shared;
  u32 base;
  Ring<STAGES> k_ring, v_ring;
  float* biases;
  u32* taken;  // the tile in each place of the ring
  DEVICE explicit Memory(u8* shared) : shared(shared), base(shared_address(shared)) {
    const u32 barriers = base + BARRIERS;
    k_ring = {base + K_RING, KTile::BYTES, barriers, barriers + 8 * STAGES};
    v_ring = {base + V_RING, VTile::BYTES, barriers + 16 * STAGES, barriers + 24 * STAGES};
    biases = reinterpret_cast<float*>(shared + BIASES);
    taken = reinterpret_cast<u32*>(shared + TAKEN);
  }
  // By one thread, before the block meets.
  DEVICE void init_barriers() const {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(k_ring.full + 8 * i, BIAS ? 33 : 1);  // each lane arrives for the biases that it wrote
      barrier_init(k_ring.empty + 8 * i, BIAS ? CONSUMERS : WARPS);
      barrier_init(v_ring.full + 8 * i, 1);
      barrier_init(v_ring.empty + 8 * i, WARPS);
    }
    barrier_init_fence();
  }
};

// The largest bias of a tile, for all lanes; not a number where one of them is not.
DEVICE float largest_of(const float (&bias)[KEYS / 32]) {
  float m = bias[0];
#pragma unroll
  for (int i = 1; i < KEYS / 32; ++i) m = max_nan(m, bias[i]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) m = max_nan(m, __shfl_xor_sync(~0u, m, distance));
  return m;
}

// The fifth warp: it fills the rings.
DEVICE void produce(const Params& p, const Memory& memory, const Share& share) {
  const u32 lane = threadIdx.x & 31;
  u32 turn = 0;
  wait_for_previous_kernel();
  const auto copy = [&](u32 tile) {
    const u32 k_landed = memory.k_ring.landed(turn), v_landed = memory.v_ring.landed(turn);
    barrier_arrive_expect(k_landed, KTile::BYTES);
    KTile::copy(memory.k_ring.tile(turn), p.map_k, k_landed, tile * KEYS, share.head / p.heads_per_k, share.batch * p.k_batches);
    memory.v_ring.wait_empty(turn);
    barrier_arrive_expect(v_landed, VTile::BYTES);
    VTile::copy(memory.v_ring.tile(turn), p.map_v, v_landed, tile * KEYS, share.head / p.heads_per_v, share.batch * p.v_batches);
  };
  if constexpr (!BIAS) {
    if (lane > 0) return;
#pragma unroll 1
    for (u32 tile = share.first; tile < share.end; ++tile, ++turn) {
      memory.k_ring.wait_empty(turn);
      copy(tile);
    }
  } else {
    float bias[KEYS / 32], next[KEYS / 32];
    key_biases(p, share.batch, share.head, share.first * KEYS, next);
    // The largest bias that was met. Padding lies at an end of the keys: what is at both of them tells whether it is hidden.
    float highest = -INFINITY;
    if constexpr (!CAUSAL) {  // else a query may not see the key
      float last[KEYS / 32];
      key_biases(p, share.batch, share.head, 0, bias);
      key_biases(p, share.batch, share.head, (p.keys - 1) / KEYS * KEYS, last);
      highest = max_nan(largest_of(bias), largest_of(last));
    }
#pragma unroll 1
    for (u32 tile = share.first; tile < share.end; ++tile) {
#pragma unroll
      for (int i = 0; i < KEYS / 32; ++i) bias[i] = next[i];
      if (tile + 1 < share.end) key_biases(p, share.batch, share.head, (tile + 1) * KEYS, next);
      const float largest = largest_of(bias);
      // Of a difference that is not a number nothing is known: such a tile stays.
      if (largest == -INFINITY || highest - largest >= MASKED) continue;
      if constexpr (!CAUSAL) highest = max_nan(highest, largest);
      memory.k_ring.wait_empty(turn);
#pragma unroll
      for (int i = 0; i < KEYS / 32; ++i) memory.biases[turn % STAGES * KEYS + 32 * i + lane] = bias[i];
      if (lane == 0) memory.taken[turn % STAGES] = tile;
      barrier_arrive(memory.k_ring.landed(turn));
      if (lane == 0) copy(tile);
      ++turn;
    }
    memory.k_ring.wait_empty(turn);
    if (lane == 0) {
      memory.taken[turn % STAGES] = NOTHING;
      barrier_arrive(memory.k_ring.landed(turn));
    }
    barrier_arrive(memory.k_ring.landed(turn));
  }
}

// The tile's rows of q, into shared memory; zeros where there is no row, and behind the features of a head.
DEVICE void copy_queries(const Params& p, u32 q_tile, const Share& share) {
  constexpr int CHUNKS = HEAD_PANELS / 8, PER_PANEL = QTile::PANEL / 8;
  const Element* const q = p.q + share.batch * p.q_stride[0] + share.head * p.q_stride[1];
#pragma unroll 4
  for (u32 i = threadIdx.x; i < ROWS * CHUNKS; i += CONSUMERS) {
    const u32 row = i / CHUNKS, chunk = i % CHUNKS, head = row / p.queries;
    uint4 v = {0, 0, 0, 0};
    if (row < p.rows && 8 * chunk < p.head_size)
      v = *reinterpret_cast<const uint4*>(q + head * p.q_stride[1] + (row - head * p.queries) * p.q_stride[2] + 8 * chunk);
    store_shared_16(q_tile + chunk / PER_PANEL * QTile::PITCH + swizzled<QTile::ROW_BYTES>(row, chunk % PER_PANEL), v);
  }
  shared_writes_fence();
  meet_at<CONSUMERS>(1);
}

// This lane's share of part `part` of all tiles' parts: rows `row` and `row` + 8, where they are there.
template <class P>
DEVICE void write_part(const P& p, const float (&out)[VALUE / 2], const float (&maximum)[2], const float (&sum)[2], u32 part, u32 row) {
  const u32 quad = threadIdx.x & 3;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool present = row + 8 * h < p.rows;
    const u64 at = static_cast<u64>(part) * p.rows + row + 8 * h;
    u32* const to = reinterpret_cast<u32*>(p.partials + at * VALUE + 2 * quad);
#pragma unroll
    for (int j = 0; j < VALUE / 8; ++j)
      store_global_8_if(present, to + 8 * j, __float_as_uint(out[4 * j + 2 * h]), __float_as_uint(out[4 * j + 2 * h + 1]));
    if (present && quad == 0) store_global_16(p.states + 4 * at, make_float4(maximum[h], sum[h], 0.0f, 0.0f));
  }
}

// The warpgroup.
DEVICE void consume(const Params& p, const Memory& memory, const Share& share) {
  const Ring<STAGES>& k_ring = memory.k_ring;
  const Ring<STAGES>& v_ring = memory.v_ring;
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  copy_queries(p, memory.base, share);
  const u32 quad = threadIdx.x & 3, row = threadIdx.x / 32 * 16 + (threadIdx.x & 31) / 4;  // and the one 8 below
  u32 query[2], head[2];  // of the lane's rows, or of the last one
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const u32 own = min(row + 8 * h, p.rows - 1), heads = own / p.queries;
    query[h] = own - heads * p.queries;
    head[h] = share.head + heads;
  }
  float s[KEYS / 2], out[VALUE / 2], bias[FULL ? KEYS / 2 : 1];
  u32 probabilities[KEYS / 4];
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {}, correction[2];
  const u64 q = panel_descriptor<QTile::ROW_BYTES>(memory.base, QTile::PITCH);
  const float scale = BIAS || FULL ? 1.0f : p.scale_log2;
  // The tile of keys of a turn, and of FULL this lane's biases, which are then on their way.
  const auto take = [&](u32 turn) {
    u32 tile = share.first + turn < share.end ? share.first + turn : NOTHING;
    if constexpr (FULL) {
      if (tile != NOTHING) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
          const u32 key = tile * KEYS + i / 4 * 8 + quad * 2 + (i & 1);
          bias[i] = Bias::at(p, share.batch, head[i >> 1 & 1], query[i >> 1 & 1], min(key, p.keys - 1));
        }
      }
    }
    if constexpr (BIAS) {
      k_ring.wait_full(turn);
      tile = __shfl_sync(~0u, memory.taken[turn % STAGES], 0);
    } else if (tile != NOTHING) {
      k_ring.wait_full(turn);
    }
    return tile;
  };
  // Each lane has read biases, and which tile it is.
  const auto leave_keys = [&](u32 turn) {
    if constexpr (BIAS) k_ring.leave_each(turn);
    else k_ring.leave(turn);
  };
  const auto begin_scores = [&](u32 turn) {
    multiply_keys(s, q, panel_descriptor<KTile::ROW_BYTES>(k_ring.tile(turn), KTile::PITCH));
  };
  const auto begin_values = [&](u32 turn) {
    v_ring.wait_full(turn);
    multiply_values(out, probabilities, panel_descriptor<VTile::ROW_BYTES>(v_ring.tile(turn), VTile::PITCH), turn > 0);
  };
  const auto soften = [&](u32 turn, u32 tile) {
    const u32 key0 = tile * KEYS;
    const float* const biases = memory.biases + turn % STAGES * KEYS + quad * 2;
#pragma unroll
    for (int i = 0; i < KEYS / 2; ++i) {
      if constexpr (BIAS) s[i] = fmaf(s[i], p.scale_log2, biases[i / 4 * 8 + (i & 1)]);
      if constexpr (FULL) s[i] = fmaf(s[i], p.scale_log2, bias_log2(bias[i]));
    }
    if (CAUSAL || (!BIAS && key0 + KEYS > p.keys)) {  // a bias by key hides the keys past the end itself
      int seen[2];  // keys, counted from the lane's first column of the tile
#pragma unroll
      for (int h = 0; h < 2; ++h) seen[h] = static_cast<int>((CAUSAL ? min(p.keys, query[h] + 1) : p.keys) - key0 - quad * 2);
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i)
        if (i / 4 * 8 + (i & 1) >= seen[i >> 1 & 1]) s[i] = -INFINITY;
    }
    return running_exponentials<BIAS || FULL>(s, scale, maximum, sum, correction);
  };

  u32 tile = take(0), turn = 0;
  if (tile == NOTHING) {
#pragma unroll
    for (int i = 0; i < VALUE / 2; ++i) out[i] = 0.0f;
  } else {
    begin_scores(0);
    wgmma_wait<0>();
    wgmma_settle(s);
    soften(0, tile);
    leave_keys(0);
    round_pairs(probabilities, s);
#pragma unroll 1
    for (turn = 1; (tile = take(turn)) != NOTHING; ++turn) {
      begin_scores(turn);
      begin_values(turn - 1);
      wgmma_wait<1>();
      wgmma_settle(s);
      const bool grown = soften(turn, tile);
      leave_keys(turn);
      wgmma_wait<0>();
      wgmma_settle(out);
      wgmma_keep(probabilities);
      v_ring.leave(turn - 1);
      if (grown) {
#pragma unroll
        for (int i = 0; i < VALUE / 2; ++i) out[i] *= correction[i >> 1 & 1];
      }
      round_pairs(probabilities, s);
    }
    begin_values(turn - 1);
    wgmma_wait<0>();
    wgmma_settle(out);
    wgmma_keep(probabilities);
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
  }
  if constexpr (SPLIT) {
    maximum[0] *= scale;
    maximum[1] *= scale;
    write_part(p, out, maximum, sum, share.tile * splits_of<SPLIT>(p) + share.split, row);
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // With every key masked 0 / 0 gives the NaN that the softmax gives, unless the operator asks for zeros.
      const float factor = config::masked_rows_zero && sum[h] == 0.0f ? 0.0f : 1.0f / sum[h];
#pragma unroll
      for (int i = 0; i < VALUE / 2; ++i)
        if ((i >> 1 & 1) == h) out[i] *= factor;
    }
    emit_fragment<Epilogue, VALUE / 8, 2>(p, out, share.tile * p.rows, row, p.rows, 0, p.value_size);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const Memory memory(shared);
  const u32 warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(p.map_k);
    prefetch_tensor_map(p.map_v);
    memory.init_barriers();
  }
  __syncthreads();
  let_next_kernel_start();
  const Share share(p);
  if (warp == WARPS) produce(p, memory, share);
  else consume(p, memory, share);
  stamp_end(p.stamp);
}
