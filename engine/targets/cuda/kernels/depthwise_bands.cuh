// Depthwise convolution of fp16 or bf16 images in NHWC for sm_90a: rows of pixels stream through shared memory, each read from memory
// once, and through the matrix units (mma/banded.cuh). Sums in fp32.
//
// All images stand on top of each other in one column of rows, `pitch` rows an image: between two images lie as many rows of padding as
// a filter has to meet there. A block takes a panel of channels and UNITS · 4 pixels of the width; STREAMS parts of the column, each of
// `outputs` rows of results, run through it side by side. Rows lie in a ring of STAGES, ROWS rows each; the copy engine brings a row at
// a time and fills in what lies outside the image. Rows of results that lie between two images are computed and not stored.
//
// A warp has four channels and 16 places: units of four pixels, those of all streams at the same place of the width side by side. It
// reads a row from shared memory once, adds it to all LIVE rows of results that it belongs to, and finishes at most one of them. The
// loop over rows is unrolled over PERIOD of them, after which the accumulators have the same roles again. The first warp asks for a
// stage's next rows when it is itself through with the stage behind, so that it seldom waits for the others.
//
// What a warp has of a pixel is a quarter of a sector of memory, and such stores take twice the time. So the warps of a panel pass each
// other their sums through shared memory, and a lane stores eight channels of a pixel, beside those that have the others. Sums of a row
// are stored when those of the next one are ready, so that nobody waits for a warp that is a little behind; two slots take turns.
// Warps of a last panel whose channels are not there only store.
//
// With `sums`, what is stored is added up image by image, too (epilogue/image_sums.cuh): an image lies in as many parts as streams have
// rows of it.
//
// NOTES: an input that is infinite or NaN meets weights of zero, so it turns to NaN what a unit whose row has it, up to 4 · STEPS pixels,
// has of both channels of its pair, and with `sums` the other channel's mean, too.
#pragma once
#include "epilogue/access.cuh"
#include "epilogue/image_sums.cuh"
#include "mma/banded.cuh"
#include "mma/column_bias.cuh"
#include "ptx/arithmetic.cuh"
#include "ptx/barrier.cuh"
#include "ptx/grid.cuh"
#include "ptx/memory.cuh"
#include "ptx/shared_pairs.cuh"
#include "ptx/tma_outer.cuh"
#include "scheduler/stamp.cuh"

using Element = config::operand;
constexpr int KERNEL_H = config::kernel_h, STRIDE_H = config::stride_h, DILATION_H = config::dilation_h;
constexpr int KERNEL_W = config::kernel_w, STRIDE_W = config::stride_w, DILATION_W = config::dilation_w;
constexpr int UNITS = config::units, STREAMS = config::streams, PLACES = STREAMS * UNITS, PLACE_WARPS = (PLACES + 15) / 16;
constexpr int PANEL = config::panel, PANEL_BYTES = 2 * PANEL, CHUNKS = PANEL / 8, GROUPS = PANEL / 4;
constexpr int WARPS = PLACE_WARPS * GROUPS, THREADS = 32 * WARPS;
constexpr int REACH = (KERNEL_H - 1) * DILATION_H, LIVE = REACH / STRIDE_H + 1, PERIOD = LIVE * STRIDE_H;
constexpr int STEPS = (3 * STRIDE_W + (KERNEL_W - 1) * DILATION_W) / 4 + 1;  // of four pixels: what a unit meets of a row
constexpr int WINDOW = 4 * (UNITS - 1) * STRIDE_W + 4 * STEPS;               // pixels that a row of outputs meets
// Streams begin four pixels off, so that what neighbouring places read lies in different banks; a row has whole swizzle atoms.
constexpr int LINE = (WINDOW / 4 | 1) * 4, ROW_BYTES = (STREAMS * LINE + 7) / 8 * 8 * PANEL_BYTES;
constexpr int ROWS = config::rows, STAGES = config::stages, STAGE_BYTES = ROWS * ROW_BYTES;
constexpr int COPIED_BYTES = STREAMS * WINDOW * PANEL_BYTES;  // of a row
constexpr int CELL_BYTES = 8 * PANEL, SLOT_BYTES = 32 * CELL_BYTES, SLOTS = 2 * PLACE_WARPS;  // of sums
using Weights = BandedWeights<Element, KERNEL_H, STEPS, config::expanded>;
static_assert(STREAMS <= 32, "a lane asks for the rows of a stream");
static_assert(PERIOD % ROWS == 0, "a stage begins at the same rows of every period");
static_assert(STAGES * STAGE_BYTES + SLOTS * SLOT_BYTES + 16 * STAGES + 8 * SLOTS == config::shared_bytes, "what the host asks for");

// Where four channels of a pixel lie in a row, in bytes, under the swizzle of the panel's width.
DEVICE constexpr u32 place_of(u32 pixel, u32 group) {
  const u32 offset = pixel * PANEL_BYTES + 8 * group;
  return offset ^ (offset >> 7 & (PANEL_BYTES / 16 - 1)) << 4;
}

// Where the sums of two channels of two pixels lie in a slot, in bytes: `cell` one of the 32 pixels of the first eight places, with the one
// of the other eight; `pair` one of four of a chunk of eight channels. What a warp writes of eight neighbouring cells lies in different
// banks, and what it reads of all chunks, too.
DEVICE constexpr u32 sums_of(u32 cell, u32 chunk, u32 pair) {
  const u32 turned = (cell & 1) << 2 | (cell >> 1 & 3);
  return cell * CELL_BYTES + ((16 * CHUNKS * pair + 16 * chunk) ^ 16 * turned);
}
// The same of another pair, where `first` is that of the first one, and of the one after an even one.
DEVICE constexpr u32 pair_of(u32 first, u32 pair) {
  return CHUNKS == 8 ? first + 128 * pair : (first ^ 64 * (pair & 1)) + 128 * (pair / 2);
}

// What the warp that asks the copy engine for rows knows: each of its first lanes the place of a stream's next row.
struct Feeder {
  int y, image;
  // `first`: the block's first row of results.
  DEVICE Feeder(const Params& p, u32 first, u32 lane) {
    // One image further down, so that the padding above the first one counts as rows of an image, too.
    const u32 place = (first + lane * p.outputs) * STRIDE_H + p.pitch - p.pad_h, above = place / p.pitch;
    y = static_cast<int>(place - above * p.pitch);
    image = static_cast<int>(above) - 1;
  }
  // Fills a stage, which all have left, with the next rows: `left` of them there are.
  DEVICE void fill(const Params& p, u32 ring, u32 landed, u32 stage, u32 channel, u32 x, u32 left, u32 lane) {
    const u32 count = min(static_cast<u32>(ROWS), left);
    if (lane == 0) barrier_arrive_expect(landed + 8 * stage, count * COPIED_BYTES);
    __syncwarp();
    if (lane < STREAMS) {
      const u32 destination = ring + stage * STAGE_BYTES + lane * (LINE * PANEL_BYTES);
#pragma unroll 1
      for (u32 i = 0; i < count; ++i) {
        copy_box(destination + i * ROW_BYTES, p.map_x, landed + 8 * stage, channel, x, static_cast<u32>(y), static_cast<u32>(image));
        if (++y == static_cast<int>(p.pitch)) { y = 0; ++image; }
      }
    }
    __syncwarp();
  }
};

// A lane's pixel in every row of results: what it stores of it, and where.
struct Results {
  u32 stream, unit, mine, begin, y, output;
  DEVICE Results(const Params& p, u32 place, u32 pixel, u32 tile, u32 first, u32 end, bool there) {
    stream = place % STREAMS;
    unit = tile * UNITS + place / STREAMS;
    begin = first + stream * p.outputs;
    const u32 x = 4 * unit + pixel, pitch = p.pitch / STRIDE_H, image = begin / pitch;
    mine = there && place < PLACES && x < p.out_w && begin < end ? min(p.outputs, end - begin) : 0;  // rows
    y = begin - image * pitch;
    output = (image * p.out_h + y) * p.out_w + x;
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, config::blocks) kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) u8 shared[];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x / 32, group = warp % GROUPS, place_warp = warp / GROUPS;
  const u32 ring = shared_address(shared), full = ring + STAGES * STAGE_BYTES + SLOTS * SLOT_BYTES, empty = full + 8 * STAGES;
  const u32 ready = empty + 8 * STAGES + 16 * place_warp;  // the sums of two slots
  const u32 tile = blockIdx.x / p.panels, channel0 = (blockIdx.x - tile * p.panels) * PANEL;
  const bool computes = channel0 + 4 * group < p.channels;
  if (threadIdx.x == 0) {
    prefetch_tensor_map(p.map_x);
    const u32 groups = min(static_cast<u32>(GROUPS), (p.channels - channel0) / 4);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, groups * PLACE_WARPS);
    }
    for (int i = 0; i < SLOTS; ++i) barrier_init(ready + 8 * i, 32 * GROUPS);
    barrier_init_fence();
  }
  __syncthreads();
  let_next_kernel_start();

  const u32 first = blockIdx.y * (STREAMS * p.outputs), end = min(first + STREAMS * p.outputs, p.lines);  // of rows of results
  const u32 rows = (min(p.outputs, end - first) - 1) * STRIDE_H + REACH + 1;
  const u32 x = tile * (4 * UNITS) * STRIDE_W - p.pad_w;
  Weights weights;  // constants: no kernel before this one writes them
  if (computes) weights.load(p.w + static_cast<i64>(channel0 / 4 + group) * (64 * Weights::WORDS), lane);

  wait_for_previous_kernel();
  stamp_begin(p.stamp);
  Feeder feeder(p, first, lane);
  if (warp == 0)
    for (int i = 0; i < STAGES && i * ROWS < rows; ++i) feeder.fill(p, ring, full, i, channel0, x, rows - i * ROWS, lane);

  // Where this lane finds the first eight pixels of two places in a row; the swizzle is the same eight pixels on.
  u32 source[2][2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const u32 place = min(16 * place_warp + lane / 4 + 8 * h, static_cast<u32>(PLACES - 1));
#pragma unroll
    for (int s = 0; s < 2; ++s)
      source[h][s] = unknown(ring + place_of(place % STREAMS * LINE + 4 * (place / STREAMS) * STRIDE_W + 4 * s + (lane & 3), group));
  }

  // What it stores: eight channels of a pixel.
  const u32 place = group + GROUPS * (lane / (4 * CHUNKS)), pixel = lane / CHUNKS % 4, channel = channel0 + 8 * (lane % CHUNKS);
  const bool there = channel < p.channels;
  Results at(p, 16 * place_warp + place, pixel, tile, first, end, there);
  const u32 column = there ? channel : 0, out_pitch = p.pitch / STRIDE_H, between = (p.out_h - out_pitch) * p.out_w;
  const Epilogue::Fixed fixed = Epilogue::fetch_fixed(p, column, 8);
  const u32 slots = ring + STAGES * STAGE_BYTES + 2 * SLOT_BYTES * place_warp;
  const u32 given = unknown(slots + pair_of(sums_of(lane, group / 2, 0), 2 * (group & 1)));
  const u32 taken = unknown(slots + sums_of(4 * (place % 8) + pixel, lane % CHUNKS, 0) + place / 8 * 8);
  ColumnBias<config::bias> bias[2];
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) bias[pair].load(p, channel0 + 4 * group + 2 * pair);

  ImageSums<config::sums, 4, CHUNKS> pixels;

  // Stores row `done` of the results, whose sums all warps have given.
  const auto store = [&](u32 done) {
    barrier_wait(ready + 8 * (done % 2), done / 2 % 2);
    if (done < at.mine && at.y < p.out_h) {
      const Epilogue::Varying varying = Epilogue::fetch_varying(p, at.output, column, 8);
      float v[8];
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const float2 two = load_shared_8f(pair_of(taken, pair) + done % 2 * SLOT_BYTES);
        v[2 * pair] = two.x;
        v[2 * pair + 1] = two.y;
      }
      Epilogue::store(p, at.output, column, 8, v, fixed, varying);
      pixels.add(v, {fixed, varying});
    }
    const bool whole = at.y + 1 == p.out_h, ends = done < at.mine && at.y < p.out_h && (whole || done + 1 == at.mine);
    pixels.end_row(p, {ends, whole, at.begin + done, out_pitch, blockIdx.y * STREAMS + at.stream, at.unit, column});
    at.output += p.out_w;
    if (++at.y == out_pitch) { at.y = 0; at.output += between; }
  };

  // An operand is four registers of four loads: that it is put together once, and not before every product, takes an instruction that the
  // assembler does not see through. There is one layer of blocks.
  const u32 as_it_is = 0x3210 + blockIdx.z;
  float d[LIVE][2][4] = {};
  u32 stage = 0, parity = 0;
  int finished = 1 - LIVE;  // rows of results; the first ones lack some of their inputs
  for (u32 row = 0; row < rows; row += PERIOD) {
#pragma unroll
    for (int i = 0; i < PERIOD; ++i) {
      if (row + i >= rows) break;
      if (i % ROWS == 0 && computes) {
        barrier_wait(full + 8 * stage, parity);
        // What was read of the stage before this one has been used by now. Given back as soon as the reads are under way, it was sometimes
        // overwritten before they came: they may be held up by stores, and barriers not.
        __syncwarp();
        if (lane == 0 && row + i > 0) barrier_arrive(empty + 8 * (stage == 0 ? STAGES - 1 : stage - 1));
      }
      if (computes && i % STRIDE_H <= REACH) {  // else no filter meets it
        const u32 line = stage * STAGE_BYTES + i % ROWS * ROW_BYTES;
#pragma unroll
        for (int first_step = 0; first_step < STEPS; first_step += 2) {
          const bool both = first_step + 1 < STEPS;
          u32 a[2][4];  // of a pair of channels: two places under a step, and under the next one
#pragma unroll
          for (int s = 0; s < (both ? 2 : 1); ++s)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const uint2 four = load_shared_8(source[h][s] + line + 4 * first_step * PANEL_BYTES);
              a[0][2 * s + h] = permute_bytes(four.x, as_it_is);
              a[1][2 * s + h] = permute_bytes(four.y, as_it_is);
            }
#pragma unroll
          for (int age = 0; age < LIVE; ++age) {
            const int under = i % STRIDE_H + age * STRIDE_H, r = under / DILATION_H;
            if (under % DILATION_H != 0 || r >= KERNEL_H) continue;
            float (&sum)[2][4] = d[(i / STRIDE_H + LIVE - age) % LIVE];
            if (under == 0 && first_step == 0)
#pragma unroll
              for (int pair = 0; pair < 2; ++pair) bias[pair].begin(sum[pair]);
            weights.multiply(sum, a, r, first_step, both);
          }
        }
      }
      if (i % ROWS == ROWS - 1) {
        const u32 next = row + i + 1 + (STAGES - 2) * ROWS;  // that the stage behind this one has to bring
        if (warp == 0 && row + i >= ROWS && next < rows) {
          const u32 behind = stage == 0 ? STAGES - 1 : stage - 1;
          barrier_wait(empty + 8 * behind, stage == 0 ? parity ^ 1 : parity);
          feeder.fill(p, ring, full, behind, channel0, x, rows - next, lane);
        }
        if (++stage == STAGES) { stage = 0; parity ^= 1; }
      }
      if (i % STRIDE_H == REACH % STRIDE_H) {  // the last input of a row of results
        if (finished > 0) store(finished - 1);
        if (finished >= 0) {
          if (computes) {
            const float (&sum)[2][4] = d[(i / STRIDE_H + 1) % LIVE];
#pragma unroll
            for (int pair = 0; pair < 2; ++pair)
              store_shared_16(pair_of(given, pair) + finished % 2 * SLOT_BYTES,
                              make_float4(sum[pair][0], sum[pair][1], sum[pair][2], sum[pair][3]));
          }
          barrier_arrive(ready + 8 * (finished % 2));
        }
        ++finished;
      }
    }
  }
  store(finished - 1);
  stamp_end(p.stamp, lane == 0);
}
