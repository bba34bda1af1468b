// Matrix product of many rows and a short k, which is bound by memory: a[m, k] · b[n, k]ᵀ of fp16, bf16 or fp32 rounded to tf32
// (`refined`: only a is, b is split in two such numbers). b lies in shared memory as fragments; warps walk over slices of 16 rows of a,
// whose next slice is under way from memory to registers while this one is multiplied. No barrier but the first, so that many warps of a
// multiprocessor load, multiply and store at once. Blocks along y have columns of their own.
// The sum runs over k in an order of its own: of 64 bytes of a row each of four lanes loads 16 at once, and of the last 32, where there
// are no 64, 8; b is arranged alike. Nor are the columns of a matrix instruction neighbours: a lane ends up with
// eight that are, without an exchange. `narrow`: rows of a begin at multiples of 4 bytes only, and come in words. Results of 16 bits whose
// rows are not aligned pass from lane to lane (`store_shifted` of epilogue/access.cuh).
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int WORDS = config::words;  // of a row that a lane loads: 32 bits each
constexpr int WHOLE = WORDS / 4;      // times 64 bytes of k
constexpr bool REST = WORDS % 4 != 0;  // 32 bytes more
constexpr int GROUPS = config::groups, THREADS = config::threads, WARPS = THREADS / 32;
constexpr int WHOLE_K = 64 / sizeof(Element), LANE_K = 16 / sizeof(Element), REST_K = 8 / sizeof(Element);  // the last two: of a lane
constexpr int CHUNKS = WORDS;  // 16-byte chunks that a lane has of a group of 32 columns of b
static_assert(WORDS % 4 == 0 || WORDS % 4 == 2, "16 or 8 bytes");
constexpr bool REFINED = config::refined;
constexpr u32 FRAGMENT_BYTES = GROUPS * CHUNKS * 32 * 16;  // of b, or of each of its parts
static_assert((REFINED ? 2 : 1) * FRAGMENT_BYTES == config::shared_bytes, "the host asks for the fragments of b");
static_assert(!REFINED || same<Element, float>::value, "only fp32 is rounded");
static_assert(WIDTH == 8, "a lane has eight columns");
constexpr bool NARROW = config::narrow;
constexpr bool HELD = config::held;  // what the epilogue reads that is the same in every row stays in registers
constexpr int UNROLL = HELD ? GROUPS : 1;

struct Words { u32 word[WORDS]; };

DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (same<Element, half>::value) mma_f16_16816(d, a, b0, b1);
  else if constexpr (same<Element, bfloat16>::value) mma_bf16_16816(d, a, b0, b1);
  else mma_tf32_1688(d, a, b0, b1);
}

// A lane's 16 bytes of 64 of a row, or 8 of the last 32; zeros where `present` says that there is no such row, and beyond k, which
// only the last 32 bytes can be. BY_WORD: rows are no multiple of 16 bytes long, and behind them is something else.
template <int PIECE, bool BY_WORD> DEVICE auto load_piece(const Element* row, bool present, u32 quad, u32 ks) {
  constexpr bool IS_REST = PIECE == WHOLE, LAST = 64 * (PIECE + 1) > 16 * WORDS - 32;
  typename choose<IS_REST, uint2, uint4>::type piece = {};
  const u32 own = WHOLE_K * PIECE + (IS_REST ? REST_K : LANE_K) * quad;
  if constexpr (BY_WORD) {
    constexpr u32 COUNT = sizeof(piece) / 4, PER_WORD = 4 / sizeof(Element);
    u32 word[4] = {};
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i)
      if (present && (!LAST || own + PER_WORD * i < ks)) word[i] = reinterpret_cast<const u32*>(row + own)[i];
    if constexpr (IS_REST) piece = make_uint2(word[0], word[1]);
    else piece = make_uint4(word[0], word[1], word[2], word[3]);
  } else if (present && (!LAST || own < ks)) {
    piece = *reinterpret_cast<const decltype(piece)*>(row + own);
  }
  return piece;
}
// What the matrix instruction takes of a word in memory: pairs of halves as they are.
DEVICE u32 rounded(u32 word) {
  if constexpr (same<Element, float>::value) return round_to_tf32(__uint_as_float(word));
  else return word;
}
// What rounding leaves of a number, rounded.
DEVICE u32 rest(u32 word) { return round_to_tf32(__uint_as_float(word) - __uint_as_float(round_to_tf32(__uint_as_float(word)))); }

// Chunk i of the fragments of b from column `base` on: 16 bytes that belong to a lane. Of 64 bytes of k a chunk is one block of eight
// columns for two instructions along k, of the rest it is two blocks for one.
template <int PIECE = 0> DEVICE uint4 load_chunk(const Params& p, u32 chunk, u32 first, u32 quad) {
  if constexpr (PIECE < WHOLE) {
    const u32 row = first + chunk % 4;
    if (chunk / 4 == PIECE) return load_piece<PIECE, false>(p.b + row * p.b_stride, row < p.n, quad, p.k);
    return load_chunk<PIECE + 1>(p, chunk, first, quad);
  } else if constexpr (REST) {
    const u32 row = first + 2 * (chunk - 4 * WHOLE);
    const uint2 v = load_piece<WHOLE, false>(p.b + row * p.b_stride, row < p.n, quad, p.k);
    const uint2 w = load_piece<WHOLE, false>(p.b + (row + 1) * p.b_stride, row + 1 < p.n, quad, p.k);
    return make_uint4(v.x, v.y, w.x, w.y);
  } else {
    return {};
  }
}
DEVICE uint4 load_chunk(const Params& p, u32 i, u32 base) {
  const u32 lane = i % 32, group = i / (32 * CHUNKS);
  return load_chunk(p, i / 32 % CHUNKS, base + 32 * group + 4 * (lane / 4), lane & 3);  // beyond the last group are no columns
}

// This thread's share of them, on its way before any of it is stored.
struct Share { uint4 chunk[(GROUPS * CHUNKS * 32 + THREADS - 1) / THREADS]; };

DEVICE Share load_share(const Params& p, u32 base) {
  Share share;
#pragma unroll
  for (int pass = 0; pass < sizeof(Share) / 16; ++pass) share.chunk[pass] = load_chunk(p, pass * THREADS + threadIdx.x, base);
  return share;
}

DEVICE void store_share(u32 fragments, const Share& share) {
#pragma unroll
  for (int pass = 0; pass < sizeof(Share) / 16; ++pass) {
    const u32 i = pass * THREADS + threadIdx.x;
    const uint4 c = share.chunk[pass];
    if (i >= GROUPS * CHUNKS * 32) continue;
    store_shared_16(fragments + 16 * i, make_uint4(rounded(c.x), rounded(c.y), rounded(c.z), rounded(c.w)));
    if constexpr (REFINED) store_shared_16(fragments + FRAGMENT_BYTES + 16 * i, make_uint4(rest(c.x), rest(c.y), rest(c.z), rest(c.w)));
  }
}

struct Slice { Words upper, lower; };  // rows r and r + 8, r = lane / 4

template <int PIECE = 0> DEVICE void load_pieces(Words& words, const Element* row, bool present, u32 quad, u32 ks) {
  if constexpr (PIECE < WHOLE) {
    const uint4 v = load_piece<PIECE, NARROW>(row, present, quad, ks);
    words.word[4 * PIECE] = rounded(v.x);
    words.word[4 * PIECE + 1] = rounded(v.y);
    words.word[4 * PIECE + 2] = rounded(v.z);
    words.word[4 * PIECE + 3] = rounded(v.w);
    load_pieces<PIECE + 1>(words, row, present, quad, ks);
  } else if constexpr (REST) {
    const uint2 v = load_piece<WHOLE, NARROW>(row, present, quad, ks);
    words.word[4 * WHOLE] = rounded(v.x);
    words.word[4 * WHOLE + 1] = rounded(v.y);
  }
}
DEVICE Words load_row(const Params& p, u32 row, u32 quad) {
  Words words;
  load_pieces(words, p.a + row * p.a_stride, row < p.m, quad, p.k);
  return words;
}
DEVICE Slice load_slice(const Params& p, u32 row, u32 quad) { return {load_row(p, row, quad), load_row(p, row + 8, quad)}; }

// Columns 32 group … of a slice. Column c of block b of d is column 4c + b of the group.
DEVICE void multiply_group(float (&d)[16], const Slice& a, u32 fragments, u32 group, u32 lane) {
  const u32 place = fragments + (group * CHUNKS * 32 + lane) * 16;
#pragma unroll
  for (int i = 0; i < WHOLE; ++i) {
    const u32(&u)[WORDS] = a.upper.word, (&l)[WORDS] = a.lower.word;
    const u32 first[4] = {u[4 * i], l[4 * i], u[4 * i + 1], l[4 * i + 1]}, second[4] = {u[4 * i + 2], l[4 * i + 2], u[4 * i + 3], l[4 * i + 3]};
#pragma unroll
    for (int chunk = 0; chunk < 4; ++chunk) {
      const uint4 b = load_shared_16(place + (4 * i + chunk) * 32 * 16);
      float(&block)[4] = *reinterpret_cast<float(*)[4]>(&d[4 * chunk]);
      multiply(block, first, b.x, b.y);
      multiply(block, second, b.z, b.w);
    }
  }
  if constexpr (REST) {
    constexpr int W = 4 * WHOLE;
    const u32 last[4] = {a.upper.word[W], a.lower.word[W], a.upper.word[W + 1], a.lower.word[W + 1]};
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      const uint4 b = load_shared_16(place + (W + chunk) * 32 * 16);
      multiply(*reinterpret_cast<float(*)[4]>(&d[8 * chunk]), last, b.x, b.y);
      multiply(*reinterpret_cast<float(*)[4]>(&d[8 * chunk + 4]), last, b.z, b.w);
    }
  }
}

// A row of results in the block's columns, of which a lane has eight neighbouring ones of each group, one group after the other.
template <class EPILOGUE, bool SHIFTED = EPILOGUE::SHIFTED> struct Line {
  typename EPILOGUE::Targets targets;
  bool present;
  DEVICE Line(const Params& p, u32 row, u32, u32, bool present) : targets(EPILOGUE::to(p, row)), present(present) {}
  DEVICE void store(const Params& p, u32 column, u32 count, const float (&v)[8], const typename EPILOGUE::Inputs& inputs) const {
    EPILOGUE::store(p, targets, column, present ? count : 0, v, inputs);
  }
  DEVICE void end(const Params&, u32) const {}
};
template <class EPILOGUE> struct Line<EPILOGUE, true> {  // all lanes of the warp take part
  typename EPILOGUE::Carries carries;
  u32 row, first, last;
  bool present;
  DEVICE Line(const Params&, u32 row, u32 first, u32 last, bool present) : carries{}, row(row), first(first), last(last), present(present) {}
  DEVICE void store(const Params& p, u32 column, u32, const float (&v)[8], const typename EPILOGUE::Inputs& inputs) {
    const Along at = column < first + 32 ? Along::FIRST : Along::WITHIN;
    EPILOGUE::store_shifted(p, row, column, first, last, present, at, v, inputs, carries);
  }
  DEVICE void end(const Params& p, u32 beyond) { EPILOGUE::template store_rest<8>(p, row, beyond, first, last, present, carries); }
};

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 fragments = shared_address(shared);
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 lane = threadIdx.x & 31, quad = lane & 3, stride = 16 * WARPS * gridDim.x;
  const u32 base = 32 * GROUPS * blockIdx.y, end = min(p.n, base + 32 * GROUPS);
  const auto column_of = [&](u32 group) { return base + 32 * group + 8 * quad; };
  const auto count_of = [&](u32 group) { return column_of(group) < p.n ? min(8u, p.n - column_of(group)) : 0; };
  const auto fetch_fixed = [&](u32 column) {
    const u32 c = column_there(column, p.n);
    return Epilogue::fetch_fixed(p, c, min(8u, p.n - c));
  };
  u32 row = 16 * (blockIdx.x * WARPS + threadIdx.x / 32) + lane / 4;
  const Share share = load_share(p, base);
  Slice slice = load_slice(p, row, quad);
  Epilogue::Fixed held[HELD ? GROUPS : 1];
  if constexpr (HELD) {
#pragma unroll
    for (int group = 0; group < GROUPS; ++group)
      held[group] = fetch_fixed(column_of(group));
  }
  store_share(fragments, share);
  __syncthreads();

  // The warp's first row decides for all of its lanes, which multiply together.
  for (; row - lane / 4 < p.m; row += stride) {
    const Slice next = load_slice(p, row + stride, quad);
    const u32 rows[2] = {min(row, p.m - 1), min(row + 8, p.m - 1)};
    const Epilogue::Rows sources[2] = {Epilogue::at(p, rows[0]), Epilogue::at(p, rows[1])};
    Line<Epilogue> lines[2] = {{p, rows[0], base, end, row < p.m}, {p, rows[1], base, end, row + 8 < p.m}};
#pragma unroll UNROLL
    for (int group = 0; group < GROUPS; ++group) {
      const u32 column = column_of(group), count = count_of(group);
      Epilogue::Fixed fixed;
      Epilogue::Varying varying[2];
      if constexpr (HELD) fixed = held[group];
      else fixed = fetch_fixed(column);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const u32 c = column_there(column, p.n);
        varying[i] = Epilogue::fetch_varying(p, sources[i], c, min(8u, p.n - c));
      }
      float d[16] = {};
      if constexpr (REFINED) multiply_group(d, slice, fragments + FRAGMENT_BYTES, group, lane);
      multiply_group(d, slice, fragments, group, lane);
#pragma unroll
      for (int half_of = 0; half_of < 2; ++half_of) {
        float v[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j] = d[4 * j + 2 * half_of];
          v[j + 4] = d[4 * j + 2 * half_of + 1];
        }
        lines[half_of].store(p, column, count, v, Epilogue::Inputs{fixed, varying[half_of]});
      }
    }
#pragma unroll
    for (int half_of = 0; half_of < 2; ++half_of) lines[half_of].end(p, column_of(GROUPS));
    slice = next;
  }
  stamp_end(p.stamp);
}
