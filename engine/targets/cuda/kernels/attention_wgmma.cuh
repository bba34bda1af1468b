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
// SINGLE: there is one sequence, and nothing to find out but its length: items are those of as many padded tokens.
// EARLY: no kernel writes the starts of sequences, which are put in order while the kernel before ends.
// The two sides are attention_producer.cuh and attention_consumer.cuh; attention_memory.cuh is what lies between them.
// `Bias`, `Window` and `FullBias` come from attention_operands.py and attention_wgmma.py.
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int HEAD = config::head_padded, VALUE = config::value_padded, KEYS = config::keys;
constexpr int HEAD_PANELS = (HEAD + 31) / 32 * 32;  // the features of q and k in shared memory
constexpr int CONSUMERS = config::consumers, QUERIES = 64 * CONSUMERS, STAGES = config::stages, Q_STAGES = config::q_stages;
// BIAS: one number a key. FULL: one a score.
constexpr bool CAUSAL = config::causal, BIAS = config::bias == 1, FULL = config::bias == 2, TURNS = config::turns && CONSUMERS > 1;
constexpr bool PACKED = config::packed, SINGLE = config::single;
constexpr bool ENDS = PACKED && !SINGLE;  // sequences end within tiles: only boxes up to their end are copied
// WINDOW: a query sees the keys less than so many positions from its own only.
constexpr bool WINDOW = config::window;
static_assert(!PACKED || !WINDOW, "packed sequences have no window");
static_assert(!PACKED || config::bias == 0, "packed sequences have no bias");
// SKIPS: tiles of keys may be left out, which are then taken from the first to the last. ASCENDING: they are, because the first does not
// wait for the length. SCOUT: items come from the scout; where a block has one and nothing is skipped, each warp finds it by itself.
constexpr bool SKIPS = config::skips, ASCENDING = SINGLE && !CAUSAL;
constexpr bool SCOUT = (PACKED && !SINGLE) || SKIPS || ((BIAS || SINGLE) && config::dynamic);
static_assert(PACKED || !SINGLE, "");
constexpr bool HELPERS = BIAS || PACKED;  // the producer is three warps
constexpr int THREADS = 128 * (CONSUMERS + 1), WARPS = 4 * CONSUMERS;
constexpr int PRODUCER_REGISTERS = config::producer_registers, CONSUMER_REGISTERS = config::consumer_registers;
// Heads of a band, whose tiles of queries are dealt from the longest to the shortest, so that what comes last is short. Without a causal
// mask, and in a window, all are alike, and those of a head stay together, because they read the same k and v.
constexpr int GROUPS = CAUSAL && !WINDOW ? config::band : 1;
static_assert(!BIAS || KEYS % 32 == 0, "the lanes of a warp load the biases of a tile");
static_assert(!SKIPS || (BIAS && !CAUSAL && !WINDOW), "only biases tell what can be skipped, from the first tile on");

#include "attention_consumer.cuh"
#include "attention_producer.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const Memory memory(shared);
  const u32 warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    prefetch_tensor_map(p.map_q);
    prefetch_tensor_map(p.map_k);
    prefetch_tensor_map(p.map_v);
    memory.init_barriers();
  }
  __syncthreads();
  let_next_kernel_start();
  if (warpgroup == CONSUMERS) produce(p, memory);
  else consume(p, memory, warpgroup);
  stamp_end(p.stamp, threadIdx.x % 128 == 0);  // the producer is through long before the consumers
}
