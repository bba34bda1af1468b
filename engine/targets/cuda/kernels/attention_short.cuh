// Attention of packed sequences for sm_90a, most of which fit a tile or two: softmax(scale · q kᵀ) v with fp16 or bf16 operands that the
// copy engine can read, heads of up to 128 features, fp32 sums. What attention_wgmma.cuh takes for an item there is latency, not work. So
// a block is one warpgroup, two (wide heads) to five to a multiprocessor, and whatever one waits for the others hide: no warp only
// produces, pieces (64 queries of one head) are dealt beforehand, and what is copied next is known before it is asked for.
// The warp whose rows are empty most often starts copies, STAGES steps (a tile of keys of a piece) ahead.
// Rows of v beyond the end of a sequence become zeros while the scores are computed: their probabilities are 0, but 0 · NaN is NaN,
// and what one sequence holds must not reach another. Copies end with the boxes of BOX rows that a sequence needs.
// EARLY: no kernel writes the starts of sequences, which are put in order while the kernel before ends.
// `Sequences` comes from attention_operands.py.
#pragma once
#include "attention_rings.cuh"
#include "attention_running.cuh"
#include "epilogue/fragment.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int HEAD = config::head_padded, VALUE = config::value_padded, KEYS = 64, QUERIES = 64;
constexpr int HEAD_PANELS = (HEAD + 31) / 32 * 32;  // the features of q and k in shared memory
constexpr int STAGES = config::stages, BOX = config::box;
constexpr bool CAUSAL = config::causal;
constexpr u32 COPIER = 3;  // the warp
using QTile = Tile<QUERIES, HEAD_PANELS>;
using KTile = Tile<KEYS, HEAD_PANELS>;
using VTile = Tile<KEYS, VALUE>;

#include "attention_order.cuh"
#include "attention_products.cuh"

// Shared memory: tiles of q, k and v of every stage, pieces, places, barriers. As in attention_short.py.
constexpr int K_RING = STAGES * QTile::BYTES, V_RING = K_RING + STAGES * KTile::BYTES, PIECES = V_RING + STAGES * VTile::BYTES;
constexpr u32 DEALT = 32;  // pieces that are looked up at once, a lane each, while as many before them are in use
constexpr int ORDER = PIECES + 2 * DEALT * sizeof(Piece), BARRIERS = ORDER + 12 * PLACES;
static_assert(BARRIERS + 8 * STAGES == config::shared_bytes, "the host asks for as much");
static_assert(STAGES < DEALT && 4 * (4 + 32 * CHUNKS) <= PIECES, "");

// The same in all lanes, and the compiler knows it: else it would keep descriptors in ordinary registers.
DEVICE Piece uniform(const Piece& piece) {
  const auto first = [](u32 x) { return __shfl_sync(~0u, x, 0); };
  return {first(piece.query0), first(piece.head), first(piece.k_head), first(piece.v_head),
          first(piece.begin), first(piece.rows), first(piece.keys), first(piece.tiles)};
}

// The lane's part of rows `row` and row + 8 of a piece, 16 bytes at a time.
DEVICE void store_rows(const Params& p, const Piece& piece, u32 row, const float (&out)[VALUE / 2], const float (&factor)[2]) {
  const u32 quad = threadIdx.x & 3;
  Element* const first = p.out + piece.head * p.out_stride[0] + (piece.begin + row) * p.out_stride[1] + 8 * quad;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < VALUE / 32; ++i) {
      u32 v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = 4 * (4 * i + j) + 2 * h;
        v[j] = pack_pair<Element>(out[at] * factor[h], out[at + 1] * factor[h]);
      }
      transpose_words(v, quad);
      const bool present = row + 8 * h < piece.rows && 32 * i + 8 * quad < p.value_size;
      store_global_16_if(present, first + 8 * h * p.out_stride[1] + 32 * i, make_uint4(v[0], v[1], v[2], v[3]));
    }
  }
}

// Scores of keys that the lane's rows, `row` and the one 8 below, do not see become −∞: beyond those that are `kept`, from `key0` on.
template <int N> DEVICE void hide(float (&s)[N], u32 kept, u32 key0, u32 row) {
  const u32 first = 2 * (threadIdx.x & 3);
  const int seen = static_cast<int>((CAUSAL ? min(kept, row + 1 - key0) : kept) - first);
  const int lower_seen = static_cast<int>((CAUSAL ? min(kept, row + 9 - key0) : kept) - first);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i / 4 * 8 + (i & 1) >= (i & 2 ? lower_seen : seen)) s[i] = -INFINITY;
}

extern "C" __global__ void __launch_bounds__(128, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 base = shared_address(shared), warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x & 31;
  Piece* const pieces = reinterpret_cast<Piece*>(shared + PIECES);
  const auto landed = [&](u32 turn) { return base + BARRIERS + 8 * (turn % STAGES); };
  if (threadIdx.x == 0) {
    prefetch_tensor_map(p.map_q);
    prefetch_tensor_map(p.map_k);
    prefetch_tensor_map(p.map_v);
    for (int i = 0; i < STAGES; ++i) barrier_init(landed(i), 1);
    barrier_init_fence();
  }
  let_next_kernel_start();
  if (!config::early) wait_for_previous_kernel();
  u32* const places = reinterpret_cast<u32*>(shared + ORDER);
  Order order = {places, places + PLACES, places + 2 * PLACES};
  order_sequences(p, order, reinterpret_cast<u32*>(shared));
  shared_writes_fence();  // copies will overwrite what was written there
  __syncthreads();
  if (config::early) wait_for_previous_kernel();
  stamp_begin(p.stamp);

  // The copier's: steps and pieces begun, the piece under way and its next tile of keys.
  u32 copied = 0, begun = 0, next_tile = 1;
  Piece coming{};
  const auto copy_step = [&] {
    if (next_tile >= coming.tiles) {
      if (begun > 0 && coming.rows == 0) return;  // there was nothing more
      coming = uniform(pieces[begun % (2 * DEALT)]);
      next_tile = 0;
      ++begun;
    }
    if (lane == 0) {
      const u32 stage = copied % STAGES, barrier = landed(copied);
      if (coming.tiles == 0) {
        barrier_arrive(barrier);
      } else {
        const u32 key0 = next_tile * KEYS, keys = KTile::boxes_up_to<BOX>(coming.keys - key0);
        const u32 rows = next_tile == 0 ? QTile::boxes_up_to<BOX>(coming.rows - coming.query0) : 0;
        barrier_arrive_expect(barrier, rows * QTile::BOX_BYTES<BOX> + keys * (KTile::BOX_BYTES<BOX> + VTile::BOX_BYTES<BOX>));
        const u32 q = base + (begun - 1) % STAGES * QTile::BYTES, row0 = coming.begin + key0;
        const u32 k = base + K_RING + stage * KTile::BYTES, v = base + V_RING + stage * VTile::BYTES;
        QTile::copy_boxes<BOX>(rows, q, p.map_q, barrier, coming.begin + coming.query0, coming.head);
        KTile::copy_boxes<BOX>(keys, k, p.map_k, barrier, row0, coming.k_head);
        VTile::copy_boxes<BOX>(keys, v, p.map_v, barrier, row0, coming.v_head);
      }
    }
    ++copied;
    ++next_tile;
  };
  // Looks up the next pieces. They are dealt forwards and backwards in turn, so that no block has the longest of each round.
  const auto deal = [&](u32 number) {
    const u32 round = number + lane, place = round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
    pieces[round % (2 * DEALT)] = piece_at(p, order, place + round * gridDim.x);
    __syncwarp();
  };
  if (warp == COPIER) {
    deal(0);
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) copy_step();
  }

  float s[KEYS / 2], out[VALUE / 2];
  u32 probabilities[KEYS / 4] = {};
  u32 turn = 0;
#pragma unroll 1
  for (u32 number = 0;; ++number) {
    barrier_wait(landed(turn), turn / STAGES & 1);
    const Piece piece = uniform(pieces[number % (2 * DEALT)]);
    if (piece.rows == 0) break;
    if (warp == COPIER && number % DEALT == 0) deal(number + DEALT);
    const bool has_rows = piece.query0 + 16 * warp < piece.rows;  // this warp
    const u32 row = piece.query0 + 16 * warp + lane / 4;  // this lane, and the one 8 below
    const u64 q = panel_descriptor<QTile::ROW_BYTES>(base + number % STAGES * QTile::BYTES, QTile::PITCH);
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {}, correction[2];
#pragma unroll 1
    for (u32 tile = 0; tile == 0 || tile < piece.tiles; ++tile, ++turn) {
      if (tile > 0) barrier_wait(landed(turn), turn / STAGES & 1);
      if (piece.tiles > 0) {
        const u32 stage = turn % STAGES, key0 = tile * KEYS, kept = piece.keys - key0;
        const bool cut = kept < KEYS;
        multiply_keys(s, q, panel_descriptor<KTile::ROW_BYTES>(base + K_RING + stage * KTile::BYTES, KTile::PITCH));
        if (cut) {
#pragma unroll
          for (u32 i = 0; i < VTile::PITCH; i += 2048) {
            const u32 at = kept * VTile::ROW_BYTES + 16 * threadIdx.x + i;
            if (at < VTile::PITCH) {
#pragma unroll
              for (int panel = 0; panel < VTile::PANELS; ++panel)
                *reinterpret_cast<uint4*>(shared + V_RING + stage * VTile::BYTES + panel * VTile::PITCH + at) = uint4{0, 0, 0, 0};
            }
          }
          shared_writes_fence();
        }
        wgmma_wait<0>();
        wgmma_settle(s);
        if (cut) __syncthreads();
        if (has_rows) {
          // A tile with half of its keys or fewer has exponentials of those only.
          const auto exponentials = [&](auto& some) {
            if (cut || (CAUSAL && key0 + KEYS > piece.query0)) hide(some, kept, key0, row);
            if (running_exponentials<false>(some, p.scale_log2, maximum, sum, correction) && tile > 0) {
#pragma unroll
              for (int i = 0; i < VALUE / 2; ++i) out[i] *= correction[i >> 1 & 1];
            }
          };
          if (kept <= KEYS / 2) {
            exponentials(reinterpret_cast<float(&)[KEYS / 4]>(s));
#pragma unroll
            for (int i = KEYS / 4; i < KEYS / 2; ++i) s[i] = 0.0f;
          } else {
            exponentials(s);
          }
          round_pairs(probabilities, s);
        }
        multiply_values(out, probabilities, panel_descriptor<VTile::ROW_BYTES>(base + V_RING + stage * VTile::BYTES, VTile::PITCH), tile > 0);
        wgmma_wait<0>();
        wgmma_settle(out);
        wgmma_keep(probabilities);
      }
      __syncthreads();  // this stage is free, and if the piece is through its q
      if (warp == COPIER) copy_step();
    }
    if (has_rows) {
      float factor[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
        factor[h] = reciprocal_approx(sum[h]);
      }
      if (piece.tiles == 0) {  // tokens of no sequence
#pragma unroll
        for (int i = 0; i < VALUE / 2; ++i) out[i] = factor[i & 1] = 0.0f;
      }
      store_rows(p, piece, row, out, factor);
    }
  }
  stamp_end(p.stamp);
}
