// Attention on mma.sync, for every GPU from Ampere on: softmax(scale · q kᵀ + bias) v for one tile of queries of one head, keys taken
// KEYS at a time with a running maximum and a running sum; scores and probabilities live in registers only. Operands are fp16, bf16
// or fp32 (rounded to tf32, or `exact`); sums are fp32. Where v has too many features for the registers, blocks divide them.
// q, k, v: features are neighbours, every other stride is free, so slices of a fused projection are read in place. Heads are padded
// to HEAD and VALUE features by zeros. A warp owns FRAGMENTS × 16 queries.
// RING: tiles of k and v are two deep, the next pair travels while this one is used. Else there is one of each, for heads so wide
// that two pairs do not fit: v travels during q kᵀ, the next k during the softmax and p v.
// SPLIT: the keys are dealt to several blocks, for few queries (attention_split.cuh).
// `Bias` and `Window` come from attention_operands.py.
#pragma once
#include "attention_split.cuh"
#include "attention_tiles.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

enum class BiasKind { NONE, PER_KEY, FULL };  // in the order of attention.py
constexpr BiasKind BIAS = static_cast<BiasKind>(config::bias);
constexpr int WARPS = config::warps, THREADS = 32 * WARPS, FRAGMENTS = config::fragments, QUERIES = 16 * WARPS * FRAGMENTS;
constexpr int HEAD = config::head_padded, VALUE = config::value_padded;  // features a head of q and k, and of v, padded
constexpr int KEYS = config::keys, STAGES = config::ring ? 2 : 1, BIAS_STAGES = 2;
constexpr bool RING = config::ring, SPLIT = config::split, CAUSAL = config::causal, Q_IN_REGISTERS = config::q_in_registers;
constexpr bool WINDOW = config::window;  // a query sees the keys less than so many positions from its own only
constexpr int K_ROW = row_bytes(HEAD), V_ROW = row_bytes(VALUE);
constexpr int Q_BYTES = QUERIES * K_ROW, K_BYTES = KEYS * K_ROW, STAGE_BYTES = K_BYTES + KEYS * V_ROW;
constexpr int BIASES = Q_BYTES + STAGES * STAGE_BYTES;  // where the biases of a tile of keys lie, in shared memory
constexpr int BIASES_PER_THREAD = (KEYS + THREADS - 1) / THREADS;
static_assert(HEAD % 16 == 0 && VALUE % 32 == 0 && KEYS % 16 == 0, "");
static_assert(BIASES + BIAS_STAGES * KEYS * 4 == config::shared_bytes, "the host asks for tiles and biases");
// Steps of q kᵀ at once: loads of many, or products that are independent of each other, would all be begun, and spill.
constexpr int UNROLLED_STEPS = config::exact ? 2 : HEAD > 256 ? 4 : HEAD / Operand::K;
constexpr float LOG2_E = 1.4426950408889634f;

// In units of log2. A finite bias stays finite, so that a row of equal, very negative ones is uniform, not empty.
DEVICE float bias_log2(float bias) { return bias == -INFINITY ? bias : fmaxf(bias * LOG2_E, -1e38f); }

// The first key that a query sees, and the one behind the last.
DEVICE u32 keys_from(const Params& p, u32 query) { return WINDOW && query >= Window::size(p) ? query + 1 - Window::size(p) : 0; }
DEVICE u32 keys_to(const Params& p, u32 query) { return CAUSAL ? min(p.keys, query + 1) : WINDOW ? min(p.keys, query + Window::size(p)) : p.keys; }

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 q_tile = shared_address(shared), ring = q_tile + Q_BYTES;
  float* biases = reinterpret_cast<float*>(shared + BIASES);
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  // Blocks that read the same k and v are neighbours. Causal tiles cost more the later they stand: the longest of a head start first.
  const u32 query_tiles = (p.queries + QUERIES - 1) / QUERIES, splits = splits_of<SPLIT>(p);
  u32 rest = blockIdx.x;
  const auto deal = [&](u32 count) {
    const u32 index = rest % count;
    rest /= count;
    return index;
  };
  const u32 dealt = deal(query_tiles), query_tile = CAUSAL ? query_tiles - 1 - dealt : dealt, query0 = query_tile * QUERIES;
  const u32 part = deal(p.parts), split = deal(splits), head = deal(p.heads), batch = rest;
  const u32 value0 = part * VALUE;  // of the features of v this block takes VALUE
  const Element* q = p.q + batch * p.q_stride[0] + head * p.q_stride[1] + query0 * p.q_stride[2];
  const Element* k = p.k + batch * p.k_stride[0] + head / p.heads_per_k * p.k_stride[1];
  const Element* v = p.v + batch * p.v_stride[0] + head / p.heads_per_v * p.v_stride[1] + value0;
  const u32 keys = keys_to(p, query0 + QUERIES - 1), all_tiles = (keys + KEYS - 1) / KEYS;
  const u32 skipped = min(all_tiles, keys_from(p, query0) / KEYS);
  const u32 each = (all_tiles - skipped + splits - 1) / splits, first_tile = skipped + split * each, tiles = min(all_tiles, first_tile + each);

  const auto copy_k = [&](u32 tile) {
    const u32 key = tile * KEYS;
    copy_rows<THREADS, KEYS, HEAD>(ring + tile % STAGES * STAGE_BYTES, k + key * p.k_stride[2], p.k_stride[2], p.keys - key, p.head_size);
  };
  const auto copy_v = [&](u32 tile) {
    const u32 key = tile * KEYS;
    copy_rows<THREADS, KEYS, VALUE>(ring + tile % STAGES * STAGE_BYTES + K_BYTES, v + key * p.v_stride[2], p.v_stride[2], p.keys - key, p.value_size - value0);
  };
  // Biases that are the same for all queries pass through registers: asked for early, stored after a product.
  float bias[BIASES_PER_THREAD];
  const auto fetch_bias = [&](u32 tile) {
    if constexpr (BIAS == BiasKind::PER_KEY) {
#pragma unroll
      for (int i = 0; i < BIASES_PER_THREAD; ++i) {
        const u32 local = i * THREADS + threadIdx.x, key = tile * KEYS + local;
        bias[i] = local < KEYS && key < p.keys ? Bias::at(p, batch, head, 0, key) : -INFINITY;  // hides the keys past the end, too
      }
    }
  };
  const auto store_bias = [&](u32 tile) {
    if constexpr (BIAS == BiasKind::PER_KEY) {
#pragma unroll
      for (int i = 0; i < BIASES_PER_THREAD; ++i)
        if (i * THREADS + threadIdx.x < KEYS) biases[tile % BIAS_STAGES * KEYS + i * THREADS + threadIdx.x] = bias_log2(bias[i]);
    }
  };

  const u32 lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * 16 * FRAGMENTS, quad = lane & 3;
  const u32 query = query0 + warp_row + lane / 4;  // fragment f holds this lane's rows query + 16 f and query + 16 f + 8
  Fragment q_fragment[FRAGMENTS][Q_IN_REGISTERS ? HEAD / Operand::K : 1];
  float out[FRAGMENTS][VALUE / 2] = {};
  float maximum[FRAGMENTS][2], sum[FRAGMENTS][2];
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      maximum[f][h] = -INFINITY;
      sum[f][h] = 0.0f;
    }

  if (first_tile < tiles) {
    copy_rows<THREADS, QUERIES, HEAD>(q_tile, q, p.q_stride[2], p.queries - query0, p.head_size);
    copy_k(first_tile);
    if constexpr (RING) copy_v(first_tile);
    fetch_bias(first_tile);
    store_bias(first_tile);
    copy_async_commit();
  }
  for (u32 tile = first_tile; tile < tiles; ++tile) {
    copy_async_wait<0>();
    __syncthreads();  // this tile's k (RING: and v) is complete for all threads, and all have left the tile before it
    const u32 stage = ring + tile % STAGES * STAGE_BYTES, key0 = tile * KEYS;
    const bool more = tile + 1 < tiles;
    if constexpr (RING) {
      if (more) {
        copy_k(tile + 1);
        copy_v(tile + 1);
        copy_async_commit();
      }
    } else {
      copy_v(tile);
      copy_async_commit();
    }
    if (more) fetch_bias(tile + 1);

    if (Q_IN_REGISTERS && tile == first_tile) {
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
        for (int i = 0; i < HEAD / Operand::K; ++i) Operand::load_a<true, K_ROW>(q_fragment[f][Q_IN_REGISTERS ? i : 0], q_tile, warp_row + 16 * f, i);
    }
    float s[FRAGMENTS][KEYS / 2] = {};
#pragma unroll(UNROLLED_STEPS)
    for (int i = 0; i < HEAD / Operand::K; ++i) {
      if constexpr (!Q_IN_REGISTERS) {
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) Operand::load_a<true, K_ROW>(q_fragment[f][0], q_tile, warp_row + 16 * f, i);
      }
#pragma unroll
      for (int j = 0; j < KEYS / 16; ++j) {
        Fragment b[1];
        Operand::load_b<true, K_ROW>(b[0], stage, 16 * j, i);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) Operand::multiply<1>(columns_of<8>(s[f], j), q_fragment[f][Q_IN_REGISTERS ? i : 0], b);
      }
    }
    if (more) store_bias(tile + 1);
    if constexpr (!RING) {
      __syncthreads();  // all have left k
      if (more) copy_k(tile + 1);
      copy_async_commit();
    }

    // Scores in units of log2, so that the exponential is one instruction.
    const bool ragged = BIAS != BiasKind::PER_KEY && key0 + KEYS > p.keys, diagonal = CAUSAL && key0 + KEYS > query0;
    const bool edge = WINDOW && (key0 < keys_from(p, query0 + QUERIES - 1) || key0 + KEYS > keys_to(p, query0));
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i) {
        const u32 local = i / 4 * 8 + quad * 2 + (i & 1);
        float add = 0.0f;
        if constexpr (BIAS == BiasKind::PER_KEY) add = biases[tile % BIAS_STAGES * KEYS + local];
        if constexpr (BIAS == BiasKind::FULL) {
          const u32 row = query + 16 * f + (i & 2 ? 8 : 0);
          if (key0 + local < p.keys && row < p.queries) add = bias_log2(Bias::at(p, batch, head, row, key0 + local));
        }
        s[f][i] = BIAS == BiasKind::NONE ? s[f][i] * p.scale_log2 : fmaf(s[f][i], p.scale_log2, add);
      }
      if (ragged || diagonal || edge) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
          const u32 key = key0 + i / 4 * 8 + quad * 2 + (i & 1), row = query + 16 * f + (i & 2 ? 8 : 0);
          if (key >= p.keys || (CAUSAL && key > row)) s[f][i] = -INFINITY;
          if (WINDOW && (key < keys_from(p, row) || key >= keys_to(p, row))) s[f][i] = -INFINITY;
        }
      }

      float tile_maximum[2] = {-INFINITY, -INFINITY}, shift[2];
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i) tile_maximum[i >> 1 & 1] = fmaxf(tile_maximum[i >> 1 & 1], s[f][i]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float m = tile_maximum[h];
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        m = fmaxf(m, maximum[f][h]);
        shift[h] = m == -INFINITY ? 0.0f : m;  // a row masked so far: every exponential is then 0, not NaN
        const float correction = exp2_approx(maximum[f][h] - shift[h]);
        maximum[f][h] = m;
        sum[f][h] *= correction;
#pragma unroll
        for (int i = 0; i < VALUE / 2; ++i)
          if ((i >> 1 & 1) == h) out[f][i] *= correction;
      }
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i) {
        s[f][i] = exp2_approx(s[f][i] - shift[i >> 1 & 1]);
        sum[f][i >> 1 & 1] += s[f][i];
      }
    }

    if constexpr (!RING) {
      copy_async_wait<1>();
      __syncthreads();  // v is complete for all threads
    }
    add_values<Operand, FRAGMENTS, KEYS, VALUE>(out, s, stage + K_BYTES);
  }

  const u32 group = batch * p.heads + head, share = ((group * p.parts + part) * query_tiles + query_tile) * WARPS + threadIdx.x / 32;
  if (combine_splits<SPLIT>(p, out, maximum, sum, share, split)) {
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[f][h] += __shfl_xor_sync(~0u, sum[f][h], 1);
        sum[f][h] += __shfl_xor_sync(~0u, sum[f][h], 2);
        // With every key masked 0 / 0 gives the NaN that the softmax gives, unless the operator asks for zeros. A sum over no keys is 0.
        const bool zero = sum[f][h] == 0.0f && (config::masked_rows_zero || p.keys == 0);
        const float scale = zero ? 0.0f : 1.0f / sum[f][h];
#pragma unroll
        for (int i = 0; i < VALUE / 2; ++i)
          if ((i >> 1 & 1) == h) out[f][i] *= scale;
      }
      emit_values<Epilogue, VALUE>(p, out[f], group * p.queries, query + 16 * f, p.queries, value0, p.value_size);
    }
  }
  stamp_end(p.stamp);
}
