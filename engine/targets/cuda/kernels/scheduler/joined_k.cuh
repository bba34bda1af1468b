// Blocks of a cluster that share a tile of a product, each with a part of k: every one finishes a part of the tile, and gets from the others
// what they have of it, straight into its shared memory. Parts are added in the same order always, so a result has the same bits in every
// run. Nothing passes through global memory, and every block has its share of the epilogue (scheduler/split_k.cuh has the other way).
//
// The tile is THREADS / 128 warpgroups' fragments of PARTS × 64 rows and N / 2 accumulators a lane each (epilogue/fragment.cuh). A piece is
// eight columns of a row of a lane; block r finishes pieces r · OWN on of each lane, in the lane of the same number. The last blocks may
// have fewer, or none. Those that share a tile are APART numbers apart in their cluster.
#pragma once
#include "epilogue/fragment.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "scheduler/split_k.cuh"

template <class EPILOGUE, int BLOCKS, int APART, int PARTS, int N, int THREADS> struct JoinedSums {
  static constexpr int PIECES = N / 16, TOTAL = PARTS * PIECES, OWN = (TOTAL + BLOCKS - 1) / BLOCKS;
  static_assert(N % 32 == 0, "");
  static constexpr u32 PIECE_BYTES = 2 * THREADS * 16, FROM_BLOCK = OWN * PIECE_BYTES;
  static constexpr u32 BYTES = BLOCKS * FROM_BLOCK;  // in a block: what the others send, and its own

  // The bytes that the others send to this block.
  DEVICE static u32 expected() {
    const u32 first = own_rank() * OWN;
    return first < TOTAL ? (BLOCKS - 1) * min(static_cast<u32>(OWN), TOTAL - first) * PIECE_BYTES : 0;
  }
  // thread: of the THREADS, this one's number. `landed`: a barrier that expects these bytes.
  template <class T> DEVICE static void send(const T (&d)[PARTS][N / 2], u32 region, u32 landed, u32 thread) {
    const u32 rank = own_rank(), place = region + rank * FROM_BLOCK + 16 * thread;
#pragma unroll
    for (int block = 0; block < BLOCKS; ++block) {
      const u32 number = block * APART + cluster_rank() % APART;
      const u32 there = address_in_cluster(place, number), barrier = address_in_cluster(landed, number);
#pragma unroll
      for (int vector = 0; vector < 2 * OWN; ++vector) {
        const int piece = block * OWN + vector / 2, within = piece % PIECES, first = (within / 2 * 4 + vector % 2 * 2) * 4 + within % 2 * 2;
        if (piece >= TOTAL) continue;
        const T (&sums)[N / 2] = d[piece / PIECES];
        const float4 v = make_float4(as_stored(sums[first]), as_stored(sums[first + 1]), as_stored(sums[first + 4]), as_stored(sums[first + 5]));
        if (block == static_cast<int>(rank)) store_shared_16(place + vector * THREADS * 16, v);
        else store_async_in_cluster(there + vector * THREADS * 16, v, barrier);
      }
    }
  }
  // Adds up this block's pieces when they have landed and hands them to the epilogue, divided where DIVISORS says so. `row` is the lane's
  // first one, `column` the tile's.
  template <class T, class DIVISORS> DEVICE static void finish(const Params& p, u32 region, u32 landed, u32 thread, u32 row, u32 rows, u32 column, u32 columns) {
    const u32 quad = threadIdx.x & 3, rank = own_rank();
    typename EPILOGUE::Inputs inputs[OWN];
    float factor[OWN];
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const Place at(rank * OWN + i, row, column, quad);
      if constexpr (DIVISORS::DIVIDES) factor[i] = DIVISORS::factor_of(p, at.row);
      const u32 c = column_there(at.column, columns);
      inputs[i] = EPILOGUE::fetch(p, at.row < rows ? at.row : 0, c, min(8u, columns - c));
    }
    barrier_wait(landed, 0);
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const Place at(rank * OWN + i, row, column, quad);
      if (at.piece >= TOTAL) continue;
      T sums[8] = {};
#pragma unroll
      for (int block = 0; block < BLOCKS; ++block)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4 v = load_shared_16(region + block * FROM_BLOCK + (2 * i + half) * THREADS * 16 + 16 * thread);
          add_stored(sums[4 * half], __uint_as_float(v.x));
          add_stored(sums[4 * half + 1], __uint_as_float(v.y));
          add_stored(sums[4 * half + 2], __uint_as_float(v.z));
          add_stored(sums[4 * half + 3], __uint_as_float(v.w));
        }
      float v[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        v[j] = static_cast<float>(sums[j]);
        if constexpr (DIVISORS::DIVIDES) v[j] *= factor[i];
      }
      transpose_quad(v, quad);
      EPILOGUE::store(p, at.row, at.column, at.row < rows && at.column < columns ? min(8u, columns - at.column) : 0, v, inputs[i]);
    }
  }

 private:
  DEVICE static u32 own_rank() { return cluster_rank() / APART; }
  struct Place {
    u32 piece, row, column;
    DEVICE Place(u32 piece, u32 first_row, u32 first_column, u32 quad) : piece(piece) {
      const u32 within = piece % PIECES;
      row = first_row + 64 * (piece / PIECES) + 8 * (within % 2);
      column = first_column + 32 * (within / 2) + 8 * quad;
    }
  };
};
