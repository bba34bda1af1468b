// Matrix product of many rows with few columns and a short k, which is bound by memory: a[m, k] · b[n, k]ᵀ of fp16, bf16 or fp32
// rounded to tf32 (`refined`: only a is, b is split in two such numbers). b lies in shared memory as fragments; warps walk over slices of 16 rows of a, whose next slice is under way from
// memory to registers while this one is multiplied. No barrier but the first, so that many warps of a multiprocessor load,
// multiply and store at once.
// The sum runs over k in an order of its own: a lane's words of k lie side by side, so that it loads up to 16 bytes of a row at once,
// and the four lanes of a row 64; b is arranged alike. Nor are the columns of a matrix instruction neighbours: a lane ends up with
// eight that are, without an exchange.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int WORDS = config::words;  // of a row that a lane loads: 32 bits each
constexpr int GROUPS = config::groups, THREADS = config::threads, WARPS = THREADS / 32;
constexpr int LANE_K = WORDS * 4 / sizeof(Element);
constexpr int CHUNKS = WORDS;  // 16-byte chunks that a lane has of a group of 32 columns of b
static_assert(WORDS == 2 || WORDS == 4, "8 or 16 bytes");
constexpr bool REFINED = config::refined;
constexpr u32 FRAGMENT_BYTES = GROUPS * CHUNKS * 32 * 16;  // of b, or of each of its parts
static_assert((REFINED ? 2 : 1) * FRAGMENT_BYTES == config::shared_bytes, "the host asks for the fragments of b");
static_assert(!REFINED || same<Element, float>::value, "only fp32 is rounded");
static_assert(WIDTH == 8, "a lane has eight columns");

struct alignas(WORDS * 4) Words { u32 word[WORDS]; };

DEVICE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (same<Element, half>::value) mma_f16_16816(d, a, b0, b1);
  else if constexpr (same<Element, bfloat16>::value) mma_bf16_16816(d, a, b0, b1);
  else mma_tf32_1688(d, a, b0, b1);
}

// A lane's words of `row`, from element k on; zeros beyond the rows and beyond k.
DEVICE Words load_words(const Element* matrix, i64 stride, u32 row, u32 rows, u32 k, u32 ks) {
  Words words = {};
  if (row < rows && k < ks) words = *reinterpret_cast<const Words*>(matrix + row * stride + k);
  return words;
}
// What the matrix instruction takes of a word in memory: pairs of halves as they are.
DEVICE u32 rounded(u32 word) {
  if constexpr (same<Element, float>::value) return round_to_tf32(__uint_as_float(word));
  else return word;
}
// What rounding leaves of a number, rounded.
DEVICE u32 rest(u32 word) { return round_to_tf32(__uint_as_float(word) - __uint_as_float(round_to_tf32(__uint_as_float(word)))); }

// The fragments of b, chunk by chunk: of 16 bytes that belong to a lane. With four words a chunk is one block of eight columns for
// two instructions along k, with two words it is two blocks for one. This thread's share, on its way before any of it is stored.
struct Share { uint4 chunk[(GROUPS * CHUNKS * 32 + THREADS - 1) / THREADS]; };

DEVICE Share load_share(const Params& p) {
  Share share;
#pragma unroll
  for (int pass = 0; pass < sizeof(Share) / 16; ++pass) {
    const u32 i = pass * THREADS + threadIdx.x, lane = i % 32, chunk = i / 32 % CHUNKS, group = i / (32 * CHUNKS);
    const u32 k = (lane & 3) * LANE_K, first = 32 * group + 4 * (lane / 4);  // beyond the last group are no columns
    if constexpr (WORDS == 4) {
      const Words w = load_words(p.b, p.b_stride, first + chunk, p.n, k, p.k);
      share.chunk[pass] = make_uint4(w.word[0], w.word[1], w.word[2], w.word[3]);
    } else {
      const Words w = load_words(p.b, p.b_stride, first + 2 * chunk, p.n, k, p.k);
      const Words v = load_words(p.b, p.b_stride, first + 2 * chunk + 1, p.n, k, p.k);
      share.chunk[pass] = make_uint4(w.word[0], w.word[1], v.word[0], v.word[1]);
    }
  }
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

DEVICE Slice load_slice(const Params& p, u32 row, u32 quad) {
  const u32 k = quad * LANE_K;
  Slice slice;
  slice = {load_words(p.a, p.a_stride, row, p.m, k, p.k), load_words(p.a, p.a_stride, row + 8, p.m, k, p.k)};
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    slice.upper.word[i] = rounded(slice.upper.word[i]);
    slice.lower.word[i] = rounded(slice.lower.word[i]);
  }
  return slice;
}

// Columns 32 group … of a slice. Column c of block b of d is column 4c + b of the group.
DEVICE void multiply_group(float (&d)[16], const Slice& a, u32 fragments, u32 group, u32 lane) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const uint4 b = load_shared_16(fragments + ((group * CHUNKS + chunk) * 32 + lane) * 16);
    const u32 first[4] = {a.upper.word[0], a.lower.word[0], a.upper.word[1], a.lower.word[1]};
    if constexpr (WORDS == 4) {
      const u32 second[4] = {a.upper.word[2], a.lower.word[2], a.upper.word[3], a.lower.word[3]};
      float(&block)[4] = *reinterpret_cast<float(*)[4]>(&d[4 * chunk]);
      multiply(block, first, b.x, b.y);
      multiply(block, second, b.z, b.w);
    } else {
      multiply(*reinterpret_cast<float(*)[4]>(&d[8 * chunk]), first, b.x, b.y);
      multiply(*reinterpret_cast<float(*)[4]>(&d[8 * chunk + 4]), first, b.z, b.w);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 fragments = shared_address(shared);
  let_next_kernel_start();
  wait_for_previous_kernel();
  stamp_begin(p.stamp);

  const u32 lane = threadIdx.x & 31, quad = lane & 3, stride = 16 * WARPS * gridDim.x;
  u32 row = 16 * (blockIdx.x * WARPS + threadIdx.x / 32) + lane / 4;
  const Share share = load_share(p);
  Slice slice = load_slice(p, row, quad);
  store_share(fragments, share);
  __syncthreads();

  // The warp's first row decides for all of its lanes, which multiply together.
  for (; row - lane / 4 < p.m; row += stride) {
    const Slice next = load_slice(p, row + stride, quad);
    const u32 rows[2] = {min(row, p.m - 1), min(row + 8, p.m - 1)};
    const Epilogue::Rows sources[2] = {Epilogue::at(p, rows[0]), Epilogue::at(p, rows[1])};
    const Epilogue::Targets targets[2] = {Epilogue::to(p, rows[0]), Epilogue::to(p, rows[1])};
#pragma unroll 1
    for (u32 group = 0; group < GROUPS; ++group) {
      const u32 column = 32 * group + 8 * quad, count = column < p.n ? min(8u, p.n - column) : 0;
      Epilogue::Inputs inputs[2];
      if (count > 0) {
        inputs[0] = Epilogue::fetch(p, sources[0], column, count);
        inputs[1] = Epilogue::fetch(p, sources[1], column, count);
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
        if (count > 0 && row + 8 * half_of < p.m) Epilogue::store(p, targets[half_of], column, count, v, inputs[half_of]);
      }
    }
    slice = next;
  }
  stamp_end(p.stamp);
}
