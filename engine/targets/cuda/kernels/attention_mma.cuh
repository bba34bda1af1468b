// Attention on mma.sync: softmax(scale · q kᵀ + bias) v for one tile of queries of one head, keys taken KEYS at a time with a
// running maximum and a running sum; scores and probabilities live in registers only. fp16 operands, fp32 sums.
// q, k, v: features are neighbours, every other stride is free, so slices of a fused projection are read in place.
// Head sizes are padded to a multiple of 16 (values: 32) by zero chunks. A warp owns FRAGMENTS × 16 queries.
// `Bias::at` comes from attention.py; a bias that is the same for all queries (a padding mask) goes through shared memory.
#pragma once
#include "epilogue/fragment.cuh"
#include "epilogue/math.cuh"
#include "mma/tile.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

enum class BiasKind { NONE, PER_KEY, FULL };  // in the order of attention.py
constexpr BiasKind BIAS = static_cast<BiasKind>(config::bias);
constexpr int WARPS = config::warps, THREADS = 32 * WARPS, FRAGMENTS = config::fragments, QUERIES = 16 * WARPS * FRAGMENTS;
constexpr int HEAD = config::head_padded, VALUE = config::value_padded;  // features a head of q and k, and of v, padded
constexpr int KEYS = config::keys, STAGES = 2;
// Tile rows: 64 bytes, or a multiple of 128 (see `swizzled`).
constexpr int K_ROW = HEAD <= 32 ? 64 : (HEAD * 2 + 127) / 128 * 128, V_ROW = VALUE <= 32 ? 64 : (VALUE * 2 + 127) / 128 * 128;
constexpr int Q_BYTES = QUERIES * K_ROW, K_BYTES = KEYS * K_ROW, STAGE_BYTES = K_BYTES + KEYS * V_ROW;
constexpr int BIAS_BYTES = KEYS * 4;  // behind the ring, for each stage
static_assert(HEAD % 16 == 0 && VALUE % 32 == 0 && KEYS % 16 == 0, "");
static_assert(Q_BYTES + STAGES * (STAGE_BYTES + BIAS_BYTES) == config::shared_bytes, "the host asks for tiles and biases");
constexpr float LOG2_E = 1.4426950408889634f;

// `count` rows of `features` halves into a swizzled tile of ROWS rows; the rest of the tile becomes zero.
template <int ROWS, int ROW_BYTES, int PADDED>
DEVICE void copy_rows(u32 tile, const half* source, i64 stride, u32 count, u32 features) {
  constexpr int CHUNKS = PADDED / 8, PASSES = (ROWS * CHUNKS + THREADS - 1) / THREADS;
#pragma unroll(PASSES > 8 ? 4 : PASSES)  // many addresses at once would spill
  for (int i = 0; i < PASSES; ++i) {
    const u32 index = i * THREADS + threadIdx.x, row = index / CHUNKS, chunk = index % CHUNKS;
    if (ROWS * CHUNKS % THREADS != 0 && index >= ROWS * CHUNKS) break;
    copy_async_16(tile + swizzled<ROW_BYTES>(row, chunk), source + row * stride + 8 * chunk, row < count && 8 * chunk < features);
  }
}

// In units of log2. A finite bias stays finite, so that a row of equal, very negative ones is uniform, not empty.
DEVICE float bias_log2(float bias) { return bias == -INFINITY ? bias : fmaxf(bias * LOG2_E, -1e38f); }

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 q_tile = shared_address(shared), ring = q_tile + Q_BYTES;
  float* biases = reinterpret_cast<float*>(shared + Q_BYTES + STAGES * STAGE_BYTES);
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  // Causal tiles cost more the later they stand: the longest start first.
  const u32 query_tile = config::causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const u32 query0 = query_tile * QUERIES, head = blockIdx.y, batch = blockIdx.z, kv_head = head / p.heads_per_kv;
  const half* q = p.q + batch * p.q_stride[0] + head * p.q_stride[1] + query0 * p.q_stride[2];
  const half* k = p.k + batch * p.k_stride[0] + kv_head * p.k_stride[1];
  const half* v = p.v + batch * p.v_stride[0] + kv_head * p.v_stride[1];
  const u32 keys = config::causal ? min(p.keys, query0 + QUERIES) : p.keys, tiles = (keys + KEYS - 1) / KEYS;

  const auto copy_stage = [&](u32 tile) {
    const u32 stage = ring + (tile % STAGES) * STAGE_BYTES, key = tile * KEYS;
    copy_rows<KEYS, K_ROW, HEAD>(stage, k + key * p.k_stride[2], p.k_stride[2], keys - key, p.head_size);
    copy_rows<KEYS, V_ROW, VALUE>(stage + K_BYTES, v + key * p.v_stride[2], p.v_stride[2], keys - key, p.value_size);
    copy_async_commit();
    if constexpr (BIAS == BiasKind::PER_KEY) {
      for (u32 i = threadIdx.x; i < KEYS; i += THREADS)
        biases[tile % STAGES * KEYS + i] = key + i < p.keys ? bias_log2(Bias::at(p, batch, head, 0, key + i)) : -INFINITY;
    }
  };
  copy_rows<QUERIES, K_ROW, HEAD>(q_tile, q, p.q_stride[2], p.queries - query0, p.head_size);
  copy_stage(0);

  const u32 lane = threadIdx.x & 31, warp_row = threadIdx.x / 32 * 16 * FRAGMENTS, quad = lane & 3;
  const u32 query = query0 + warp_row + lane / 4;  // fragment f holds this lane's rows query + 16 f and query + 16 f + 8
  u32 q_fragment[FRAGMENTS][HEAD / 16][4];
  float out[FRAGMENTS][VALUE / 2] = {};
  float maximum[FRAGMENTS][2], sum[FRAGMENTS][2];
#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      maximum[f][h] = -INFINITY;
      sum[f][h] = 0.0f;
    }

  for (u32 tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) { copy_stage(tile + 1); copy_async_wait<1>(); } else copy_async_wait<0>();
    __syncthreads();
    const u32 stage = ring + (tile % STAGES) * STAGE_BYTES, key0 = tile * KEYS;
    if (tile == 0) {
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
        for (int i = 0; i < HEAD / 16; ++i) load_a<K_ROW>(q_fragment[f][i], q_tile, warp_row + 16 * f, i);
    }

    float s[FRAGMENTS][KEYS / 2] = {};
#pragma unroll
    for (int i = 0; i < HEAD / 16; ++i)
#pragma unroll
      for (int j = 0; j < KEYS / 16; ++j) {
        u32 b[4];
        load_b_k_inner<K_ROW>(b, stage, 16 * j, i);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
          mma_f16_16816(*reinterpret_cast<float(*)[4]>(&s[f][8 * j]), q_fragment[f][i], b[0], b[1]);
          mma_f16_16816(*reinterpret_cast<float(*)[4]>(&s[f][8 * j + 4]), q_fragment[f][i], b[2], b[3]);
        }
      }

    // Scores in units of log2, so that the exponential is one instruction. A per-key bias hides keys past the end itself.
    const bool ragged = BIAS != BiasKind::PER_KEY && key0 + KEYS > p.keys, diagonal = config::causal && key0 + KEYS > query0;
#pragma unroll
    for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
      for (int i = 0; i < KEYS / 2; ++i) {
        const u32 local = i / 4 * 8 + quad * 2 + (i & 1);
        float add = 0.0f;
        if constexpr (BIAS == BiasKind::PER_KEY) add = biases[tile % STAGES * KEYS + local];
        if constexpr (BIAS == BiasKind::FULL) {
          const u32 row = query + 16 * f + (i & 2 ? 8 : 0);
          if (key0 + local < p.keys && row < p.queries) add = bias_log2(Bias::at(p, batch, head, row, key0 + local));
        }
        s[f][i] = BIAS == BiasKind::NONE ? s[f][i] * p.scale_log2 : fmaf(s[f][i], p.scale_log2, add);
      }
      if (ragged || diagonal) {
#pragma unroll
        for (int i = 0; i < KEYS / 2; ++i) {
          const u32 key = key0 + i / 4 * 8 + quad * 2 + (i & 1), row = query + 16 * f + (i & 2 ? 8 : 0);
          if (key >= p.keys || (config::causal && key > row)) s[f][i] = -INFINITY;
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

    // The accumulator layout of s is the operand layout of the probabilities: 16 keys are two 8-column blocks.
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i) {
      u32 a[FRAGMENTS][4];
#pragma unroll
      for (int f = 0; f < FRAGMENTS; ++f)
#pragma unroll
        for (int r = 0; r < 4; ++r) a[f][r] = pack_half2(s[f][8 * i + 2 * r], s[f][8 * i + 2 * r + 1]);
#pragma unroll
      for (int j = 0; j < VALUE / 16; ++j) {
        u32 b[4];
        load_b_n_inner<V_ROW>(b, stage + K_BYTES, 16 * j, i);
#pragma unroll
        for (int f = 0; f < FRAGMENTS; ++f) {
          mma_f16_16816(*reinterpret_cast<float(*)[4]>(&out[f][8 * j]), a[f], b[0], b[1]);
          mma_f16_16816(*reinterpret_cast<float(*)[4]>(&out[f][8 * j + 4]), a[f], b[2], b[3]);
        }
      }
    }
    __syncthreads();  // the stage is free for the copy that the next round issues
  }

#pragma unroll
  for (int f = 0; f < FRAGMENTS; ++f) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[f][h] += __shfl_xor_sync(~0u, sum[f][h], 1);
      sum[f][h] += __shfl_xor_sync(~0u, sum[f][h], 2);
      // With no key left 0 / 0 gives the NaN that the softmax gives, unless the operator asks for zeros.
      const float scale = config::masked_rows_zero && sum[f][h] == 0.0f ? 0.0f : 1.0f / sum[f][h];
#pragma unroll
      for (int i = 0; i < VALUE / 2; ++i)
        if ((i >> 1 & 1) == h) out[f][i] *= scale;
    }
    emit_fragment<Epilogue, VALUE / 8>(p, out[f], (batch * gridDim.y + head) * p.queries, query + 16 * f, p.queries, 0, p.value_size);
  }
  stamp_end(p.stamp);
}
