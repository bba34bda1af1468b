// Recurrent networks: what depends on the step before. A group of lanes owns a unit: it reads the unit's weights of all gates once,
// multiplies them with the states of ROWS sequences, adds up by shuffles so that each lane holds one gate of one sequence, and
// applies the activations there. Small networks: a block takes its sequences through all steps, states in shared memory. Larger
// ones: a launch is one step, its units spread over the multiprocessors, states in fp32 in memory; the first weights are in
// registers before the step ahead is over. Products and states in fp32.
#pragma once
#include "epilogue/math.cuh"
#include "ptx/grid.cuh"
#include "scheduler/stamp.cuh"

enum class Cell {  // in the order of engine.ir.ops.Cell
  RNN_TANH, RNN_RELU, GRU, LSTM
};
constexpr Cell CELL = static_cast<Cell>(config::cell);
constexpr bool SEQUENCE = config::sequence;
constexpr int GATES = CELL == Cell::LSTM ? 4 : CELL == Cell::GRU ? 3 : 1, SLOTS = GATES == 3 ? 4 : GATES;  // a power of two
constexpr int ROWS = config::rows, VALUES = ROWS * SLOTS, GROUP = config::group, CHUNKS = config::chunks;
constexpr int THREADS = config::threads, GROUPS = THREADS / GROUP;
static_assert(VALUES <= GROUP && GROUP <= 32, "every sum of a unit has a lane");

using Weight = config::r_t;
constexpr int VECTOR = 16 / sizeof(Weight), PLANES = VECTOR / 4;
struct alignas(16) Weights { Weight element[VECTOR]; };

// Where a row of states keeps unit k: in planes of four, so that neighbouring lanes read neighbouring 16 bytes.
DEVICE u32 place_of(u32 k, u32 padded) { return k % VECTOR / 4 * (padded / PLANES) + k / VECTOR * 4 + k % 4; }

// The weights of a unit for its gates, from column `base` on; columns past the end are zero.
DEVICE void load_weights(const Params& p, u32 direction, u32 unit, u32 base, u32 lane, Weights (&w)[CHUNKS][GATES]) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const u32 k = base + (chunk * GROUP + lane) * VECTOR;
#pragma unroll
    for (int gate = 0; gate < GATES; ++gate) {
      const Weight* r = p.r + direction * p.r_strides[0] + (static_cast<u64>(gate) * p.hidden + unit) * p.r_strides[1] + k;
      if constexpr (config::r_vector) {
        w[chunk][gate] = k < p.hidden ? *reinterpret_cast<const Weights*>(r) : Weights();
      } else {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) w[chunk][gate].element[i] = k + i < p.hidden ? r[i] : Weight();
      }
    }
  }
}

// sum[row][gate] += the products of the columns from `base` on with the states of the rows.
DEVICE void multiply(const Params& p, const float* states, u32 base, u32 lane, const Weights (&w)[CHUNKS][GATES],
                     float (&sum)[VALUES]) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const u32 k = base + (chunk * GROUP + lane) * VECTOR;
    if (k >= p.hidden) continue;
#pragma unroll
    for (int plane = 0; plane < PLANES; ++plane) {
      float weight[GATES][4];
#pragma unroll
      for (int gate = 0; gate < GATES; ++gate)
#pragma unroll
        for (int i = 0; i < 4; ++i) weight[gate][i] = widen(w[chunk][gate].element[4 * plane + i]);
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const float4 h = *reinterpret_cast<const float4*>(states + row * p.padded + plane * (p.padded / PLANES) + k / VECTOR * 4);
#pragma unroll
        for (int gate = 0; gate < GATES; ++gate) {
          float& s = sum[row * SLOTS + gate];
          s = fmaf(h.x, weight[gate][0], s);
          s = fmaf(h.y, weight[gate][1], s);
          s = fmaf(h.z, weight[gate][2], s);
          s = fmaf(h.w, weight[gate][3], s);
        }
      }
    }
  }
}

// The sums of N values over the lanes of a group: afterwards lane l has that of value l % N. A lane passes on half of what it
// holds at every distance, so that this takes N − 1 exchanges, not N for every distance.
template <int N, int DISTANCE = 1> DEVICE float scatter_sums(const float (&v)[N], u32 lane) {
  const bool odd = lane & DISTANCE;
  if constexpr (N > 1) {
    float half[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      half[i] = (odd ? v[2 * i + 1] : v[2 * i]) + __shfl_xor_sync(~0u, odd ? v[2 * i] : v[2 * i + 1], DISTANCE);
    return scatter_sums<N / 2, 2 * DISTANCE>(half, lane);
  } else if constexpr (DISTANCE < GROUP) {
    const float both[1] = {v[0] + __shfl_xor_sync(~0u, v[0], DISTANCE)};
    return scatter_sums<1, 2 * DISTANCE>(both, lane);
  } else {
    return v[0];
  }
}

// One unit's new state from the sum and the input of this lane's gate; lanes `first` … of the warp hold the gates of its row.
// All lanes of the row return it; of an LSTM lane `first`, which alone has the cell.
DEVICE float next_state(float sum, float input, u32 gate, u32 first, float before, float bias, float& cell) {
  if constexpr (CELL == Cell::LSTM) {
    const float active = gate == 3 ? tanhf(sum + input) : sigmoid(sum + input);
    const float enter = __shfl_sync(~0u, active, first), leave = __shfl_sync(~0u, active, first + 1);
    const float keep = __shfl_sync(~0u, active, first + 2), candidate = __shfl_sync(~0u, active, first + 3);
    cell = fmaf(keep, cell, enter * candidate);
    return leave * tanhf(cell);
  } else if constexpr (CELL == Cell::GRU) {
    const float active = sigmoid(sum + input);
    const float update = __shfl_sync(~0u, active, first), reset = __shfl_sync(~0u, active, first + 1);
    const float candidate = __shfl_sync(~0u, tanhf(fmaf(reset, sum + bias, input)), first + 2);
    return fmaf(update, before - candidate, candidate);
  } else {
    return CELL == Cell::RNN_TANH ? tanhf(sum + input) : fmaxf(sum + input, 0.0f);
  }
}

DEVICE i64 offset(const i64 (&strides)[3], u32 direction, u32 row, u32 unit) {
  return direction * strides[0] + row * strides[1] + unit * strides[2];
}
DEVICE i64 offset(const i64 (&strides)[4], u32 t, u32 direction, u32 row, u32 unit) {
  return t * strides[0] + direction * strides[1] + row * strides[2] + unit * strides[3];
}

// A template, so that what a cell or a kind of launch does not have need not be among its parameters.
template <class PARAMS> DEVICE void run(const PARAMS& p, float* before) {
  const u32 direction = blockIdx.z, group = threadIdx.x / GROUP, lane = threadIdx.x % GROUP;
  const u32 row_of_lane = lane % VALUES / SLOTS, gate = lane % SLOTS, first_lane = threadIdx.x % 32 - lane + row_of_lane * SLOTS;
  const u32 first_unit = blockIdx.x * GROUPS + threadIdx.x / 32 * (32 / GROUP);  // of the warp: its groups stay together
  Weights weights[CHUNKS][GATES];

  let_next_kernel_start();
  // Weights that are constants no kernel before this one writes.
  constexpr bool EARLY = !SEQUENCE && config::r_constant, LATE = !SEQUENCE && !config::r_constant;
  const u32 unit_of_group = min(blockIdx.x * GROUPS + group, p.hidden - 1);
  if constexpr (EARLY) load_weights(p, direction, unit_of_group, 0, lane, weights);
  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  if constexpr (LATE) load_weights(p, direction, unit_of_group, 0, lane, weights);

  // In shared memory: the states of ROWS rows and, where a block takes them through all steps, those after a step and the cells.
  float* after = before + ROWS * p.padded;
  float* cells = after + ROWS * p.padded;
  const u64 plane = static_cast<u64>(p.batch) * p.hidden;  // of a direction, in memory

  for (u32 row0 = blockIdx.y * ROWS; row0 < p.batch; row0 += gridDim.y * ROWS) {
    __syncthreads();  // all have left the rows before
    for (u32 i = threadIdx.x; i < ROWS * p.padded; i += THREADS) {
      const u32 local = i / p.padded, k = i - local * p.padded;
      const bool exists = k < p.hidden && row0 + local < p.batch;
      float state = 0.0f;
      if constexpr (SEQUENCE) {
        if (exists) state = widen(p.h[offset(p.h_strides, direction, row0 + local, k)]);
        after[i] = 0.0f;
        if constexpr (CELL == Cell::LSTM)
          cells[i] = exists ? widen(p.c[offset(p.c_strides, direction, row0 + local, k)]) : 0.0f;
      } else if (exists) {
        state = p.states[(p.step % 2 * gridDim.z + direction) * plane + static_cast<u64>(row0 + local) * p.hidden + k];
      }
      before[local * p.padded + place_of(k, p.padded)] = state;
    }
    __syncthreads();

    const u32 row = row0 + row_of_lane;
    for (u32 step = p.step; step < p.end; ++step) {
      const u32 t = direction == p.reversed ? p.steps - 1 - step : step;
      for (u32 warp_unit = first_unit; warp_unit < p.hidden; warp_unit += gridDim.x * GROUPS) {
        const u32 own = warp_unit + threadIdx.x % 32 / GROUP, unit = min(own, p.hidden - 1);
        const bool has_gate = row < p.batch && gate < GATES;
        const float input = has_gate ? widen(p.x[offset(p.x_strides, t, direction, row, gate * p.hidden + unit)]) : 0.0f;
        float bias = 0.0f;
        if constexpr (CELL == Cell::GRU) bias = widen(p.b[direction * p.b_strides[0] + unit * p.b_strides[1]]);

        float sums[VALUES] = {};
        for (u32 base = 0; base < p.hidden; base += CHUNKS * GROUP * VECTOR) {
          // What was loaded first is still there, unless it was too much to keep.
          const bool lost = SEQUENCE || base > 0 || (row0 != blockIdx.y * ROWS && p.hidden > CHUNKS * GROUP * VECTOR);
          if (lost) load_weights(p, direction, unit, base, lane, weights);
          multiply(p, before, base, lane, weights, sums);
        }
        const float sum = scatter_sums(sums, lane);

        const bool writes = own < p.hidden && row < p.batch && gate == 0 && lane < VALUES;
        const u64 state = direction * plane + static_cast<u64>(row) * p.hidden + unit;
        const u32 inside = row_of_lane * p.padded + place_of(unit, p.padded), inside_cells = row_of_lane * p.padded + unit;
        float cell = 0.0f;
        if constexpr (CELL == Cell::LSTM) {  // only the lane that writes a cell reads it: shuffles order no memory
          if (writes) {
            if constexpr (SEQUENCE) cell = cells[inside_cells];
            else cell = p.cells[state];
          }
        }
        const float next = next_state(sum, input, gate, first_lane, before[inside], bias, cell);
        if (writes) {
          p.every[offset(p.every_strides, t, direction, row, unit)] = narrow<config::x_t>(next);
          if constexpr (SEQUENCE) after[inside] = next;
          else p.states[(step + 1) % 2 * gridDim.z * plane + state] = next;
          const bool is_last = step + 1 == p.steps;
          if (is_last) p.last_h[offset(p.last_h_strides, direction, row, unit)] = narrow<config::x_t>(next);
          if constexpr (CELL == Cell::LSTM) {
            if constexpr (SEQUENCE) cells[inside_cells] = cell;
            else p.cells[state] = cell;
            if (is_last) p.last_c[offset(p.last_c_strides, direction, row, unit)] = narrow<config::x_t>(cell);
          }
        }
      }
      if constexpr (SEQUENCE) {
        __syncthreads();
        float* other = before;
        before = after;
        after = other;
      }
    }
  }
  stamp_end(p.stamp);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  run(p, reinterpret_cast<float*>(shared));
}
