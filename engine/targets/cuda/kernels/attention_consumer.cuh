// A warpgroup of attention_wgmma.cuh that owns 64 queries of every item. Included there behind the constants.
#pragma once
#include "attention_memory.cuh"
#include "attention_products.cuh"
#include "attention_softmax.cuh"
#include "epilogue/fragment.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

DEVICE void consume(const Params& p, const Memory& memory, u32 warpgroup) {
  u8* const shared = memory.shared;
  const Ring<Q_STAGES>& q_ring = memory.q_ring;
  const Ring<STAGES>& k_ring = memory.k_ring;
  const Ring<STAGES>& v_ring = memory.v_ring;
  float* const biases = memory.biases;
  Item* const items = memory.items;
  u32 turn = 0, q_turn = 0;  // of the rings
  take_registers<CONSUMER_REGISTERS>();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  const u32 local_row = threadIdx.x / 32 % 4 * 16 + (threadIdx.x & 31) / 4;  // of the warpgroup's 64, and the one 8 below
  float s[KEYS / 2], out[VALUE / 2];
  u32 probabilities[KEYS / 4];
  const auto begin_scores = [&](u64 q, u32 turn) {
    multiply_keys(s, q, panel_descriptor<KTile::ROW_BYTES>(k_ring.tile(turn), KTile::PITCH));
  };
  const auto begin_values = [&](u32 turn, bool first) {
    multiply_values(out, probabilities, panel_descriptor<VTile::ROW_BYTES>(v_ring.tile(turn), VTile::PITCH), !first);
  };
  const auto round_probabilities = [&] { round_pairs(probabilities, s); };

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
    if (WINDOW) item.live = __shfl_sync(~0u, item.live, 0);
    if (PACKED) {
      item.begin = __shfl_sync(~0u, item.begin, 0);
      item.rows = __shfl_sync(~0u, item.rows, 0);
      item.keys = __shfl_sync(~0u, item.keys, 0);
    }
    if (nothing_more(item)) break;
    const u32 rows = rows_of(p, item), keys = keys_of(p, item), first_row = item.group * p.queries + begin_of(item);
    const u32 first_query = item.query0 + 64 * warpgroup, query = first_query + local_row, hidden = hidden_tiles(p, item, first_query);
    const auto pass_tile = [&](u32 t) {
      k_ring.wait_full(t);
      take_turn();
      pass_turn();
      k_ring.leave(t);
      v_ring.wait_full(t);
      v_ring.leave(t);
    };
#pragma unroll 1
    for (u32 i = 0; i < hidden; ++i) pass_tile(turn + i);
    if (hidden < item.tiles) {
      float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {}, correction[2];
      const u64 q = panel_descriptor<QTile::ROW_BYTES>(q_ring.tile(q_turn) + warpgroup * 64 * QTile::ROW_BYTES, QTile::PITCH);
      const u32 hidden_first = hidden_before(p, item, first_query, hidden), last = turn + item.tiles - 1 - hidden_first;
      const u32 bias_start = BiasTile::start(warpgroup * 64 + local_row);
      // The tile of `t`, a turn.
      const auto prepare = [&](u32 t) {
        const u32 key0 = (ASCENDING ? t - turn : first_tile(item) + hidden_first + last - t) * KEYS;
        // A bias hides the keys past the end itself.
        bool masked = (!BIAS && key0 + KEYS > keys) || (CAUSAL && key0 + KEYS > first_query + 1);
        if (WINDOW) masked |= key0 < keys_from(p, first_query + 63) || key0 + KEYS > keys_to(p, first_query, keys);
        const u8* const bias_tile = shared + BIASES + t % STAGES * BiasTile::BYTES;
        prepare_scores(p, s, biases + t % STAGES * KEYS, bias_tile, bias_start, masked, keys, key0, query);
      };
      const u32 first = turn + hidden;
      k_ring.wait_full(first);
      take_turn();
      begin_scores(q, first);
      pass_turn();
      wgmma_wait<0>();
      wgmma_settle(s);
      if constexpr (!BIAS && !FULL) k_ring.leave(first);
      prepare(first);
      if constexpr (BIAS || FULL) k_ring.leave(first);  // a place of the ring has the biases of its keys, too
      running_exponentials<SCALED>(s, scale_of(p), maximum, sum, correction);
      round_probabilities();
      // Of a row without a key so far no exponential would be right: they are not tried. NOTES: tried all the same, they would be found
      // out as infinite or NaN, but NVRTC 13 then needs the stack in tiles of few registers.
      const auto have_maxima = [&] { return __all_sync(~0u, maximum[0] != -INFINITY && maximum[1] != -INFINITY); };
      bool known = have_maxima();
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
        if constexpr (!BIAS && !FULL) k_ring.leave(t);
        prepare(t);
        if constexpr (BIAS || FULL) k_ring.leave(t);
        wgmma_wait<0>();
        wgmma_settle(out);
        wgmma_keep(probabilities);
        v_ring.leave(t - 1);
        // A maximum seldom grows so far that it has to be replaced. That is found out when the exponentials are there, while the scores
        // are, too: the registers of the probabilities are free only when the product with v is through.
        if (known && exponentials_below<SCALED, Element>(probabilities, s, scale_of(p), maximum, sum)) continue;
        if (running_exponentials<SCALED>(s, scale_of(p), maximum, sum, correction)) {
#pragma unroll
          for (int i = 0; i < VALUE / 2; ++i) out[i] *= correction[i >> 1 & 1];
          known = have_maxima();
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
        sum[h] = config::masked_rows_zero && sum[h] == 0.0f ? 0.0f : reciprocal_approx(sum[h]);
      }
      wgmma_wait<0>();
      wgmma_settle(out);
      wgmma_keep(probabilities);
      v_ring.leave(last);
#pragma unroll 1
      for (u32 i = 1; i <= hidden_first; ++i) pass_tile(last + i);
#pragma unroll
      for (int i = 0; i < VALUE / 2; ++i) out[i] *= sum[i >> 1 & 1];
      if (SINGLE) {
#pragma unroll
        for (int i = 0; i < VALUE / 2; ++i)
          if (query + (i & 2 ? 8 : 0) >= keys) out[i] = 0.0f;
      }
      emit_fragment<Epilogue, VALUE / 8, 2>(p, out, first_row, query, rows, 0, p.value_size);
    } else {
      q_ring.leave_each(q_turn);
      if (SINGLE || (PACKED && item.tiles == 0)) {
#pragma unroll
        for (int i = 0; i < VALUE / 2; ++i) out[i] = 0.0f;
        emit_fragment<Epilogue, VALUE / 8, 2>(p, out, first_row, query, rows, 0, p.value_size);
      }
    }
    turn += item.tiles;
  }
}
