// How generated expressions read and write tensors. An element is addressed by a row of the kernel's iteration space and a
// column. Rows split into LEVELS nested counters (batch, head, position …), each with its own stride per tensor, so a kernel
// whose rows are simply 0 … m−1 reads a broadcast, strided or split operand. WIDTH neighbouring columns move at once.
#pragma once
#include "ptx/memory.cuh"
#include "types.cuh"

constexpr int WIDTH = config::width;  // elements a thread handles at once: 8, or 1 where columns are not neighbours
constexpr int MAX_LEVELS = config::max_levels;  // 4, or as many as the launch's tensors need

struct Tensor {  // strides in elements; `data` points at element (0, 0)
  void* data;
  i64 row[MAX_LEVELS];  // outermost level first
  i64 column;
};
struct Levels { u32 size[MAX_LEVELS]; };  // size[0] is not needed to split a row

enum class Column { BROADCAST, UNIT, STRIDED };

template <int LEVELS> struct RowIndex { u32 level[LEVELS]; };

template <int LEVELS> DEVICE RowIndex<LEVELS> split_row(const Levels& levels, u32 row) {
  RowIndex<LEVELS> index;
#pragma unroll
  for (int i = LEVELS - 1; i > 0; --i) {
    const u32 outer = row / levels.size[i];
    index.level[i] = row - outer * levels.size[i];
    row = outer;
  }
  index.level[0] = row;
  return index;
}

template <int LEVELS> DEVICE i64 row_offset(const Tensor& t, const RowIndex<LEVELS>& index) {
  i64 offset = 0;
#pragma unroll
  for (int i = 0; i < LEVELS; ++i) offset += index.level[i] * t.row[i];
  return offset;
}

template <class T> struct alignas(sizeof(T) * WIDTH < 16 ? sizeof(T) * WIDTH : 16) Pack { T element[WIDTH]; };

// Results as they lie in memory.
template <class T, class V> DEVICE void narrow_all(Pack<T>& pack, const V (&v)[WIDTH]) {
  if constexpr (same<T, e4m3>::value && WIDTH % 2 == 0) {  // the conversion makes two
#pragma unroll
    for (int i = 0; i < WIDTH; i += 2) {
      const u16 pair = pack_e4m3x2(v[i], v[i + 1]);
      pack.element[i].bits = static_cast<u8>(pair);
      pack.element[i + 1].bits = static_cast<u8>(pair >> 8);
    }
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) pack.element[i] = narrow<T>(v[i]);
  }
}

// `count` columns from `column` on (at most WIDTH), as they lie in memory: fetched early, widened when they are used, so that
// many loads can be under way before the first store. ALIGNED: the caller has WIDTH columns, at a multiple of their size.
template <class T, Column COLUMN> struct Fetched {
  Pack<T> pack;
  DEVICE compute_t<T> operator[](int i) const { return widen(pack.element[i]); }
};
template <class T> struct Fetched<T, Column::BROADCAST> {
  T element;
  DEVICE compute_t<T> operator[](int) const { return widen(element); }
};

template <class T, Column COLUMN, bool ALIGNED> DEVICE Fetched<T, COLUMN> fetch_columns(const Tensor& t, i64 offset, u32 column, u32 count) {
  const T* p = static_cast<const T*>(t.data) + offset;
  Fetched<T, COLUMN> result;
  if constexpr (COLUMN == Column::BROADCAST) {
    result.element = *p;
  } else if constexpr (COLUMN == Column::UNIT && ALIGNED) {
    result.pack = *reinterpret_cast<const Pack<T>*>(p + column);
  } else {
    const i64 stride = COLUMN == Column::UNIT ? 1 : t.column;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) result.pack.element[i] = i < count ? p[(column + i) * stride] : T();
  }
  return result;
}

// The eight columns from `column` on of which operands are fetched: the last ones, where that is beyond `columns`. A load that always
// happens needs no merging: NVRTC 13.0 moves what others bring, and with that waits for it.
DEVICE u32 column_there(u32 column, u32 columns) { return column < columns ? column : (columns - 1) / 8 * 8; }

// WIDTH elements, if there are any.
template <class T> DEVICE void store_pack(bool any, Pack<T>* place, const Pack<T>& pack) {
  if constexpr (sizeof(Pack<T>) == 16) store_global_16_if(any, place, reinterpret_cast<const uint4&>(pack));
  else if (any) *place = pack;
}

// With a `count` of 0 nothing is stored.
template <class T, Column COLUMN, bool ALIGNED, class V>
DEVICE void store_columns(const Tensor& t, i64 offset, u32 column, u32 count, const V (&v)[WIDTH]) {
  T* p = static_cast<T*>(t.data) + offset;
  if constexpr (COLUMN == Column::UNIT && ALIGNED) {
    Pack<T> pack;
    narrow_all<T>(pack, v);
    store_pack(count > 0, reinterpret_cast<Pack<T>*>(p + column), pack);
  } else {
    const i64 stride = COLUMN == Column::UNIT ? 1 : t.column;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i)
      if (i < count) p[(column + i) * stride] = narrow<T>(v[i]);
  }
}

// What a lane keeps from one call of `store_shifted` to the next along a row: the elements that fill up its next 16 bytes.
struct Carry { u32 word[4]; };

// What [begin, end) has of the 16 bytes at `words`, whose first element is column `low`: the first of four lanes has them, and each of
// the four stores a word, or half of one.
DEVICE void store_edge(u32* words, i32 low, i32 begin, i32 end, const u32 (&x)[4]) {
  const u32 quad = threadIdx.x & 3, source = threadIdx.x & 28;
  u32 word = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const u32 v = __shfl_sync(~0u, x[j], source);
    word = quad == j ? v : word;
  }
  const i32 column = low + 2 * static_cast<i32>(quad);
  const bool lower = column >= begin && column < end, upper = column + 1 >= begin && column + 1 < end;
  store_global_4_if(lower && upper, words + quad, word);
  store_global_2_if(lower != upper, reinterpret_cast<u16*>(words + quad) + upper, static_cast<u16>(upper ? word >> 16 : word));
}

// The first `count` halves, up to seven, of the 16 bytes at `words`.
DEVICE void store_front(u32* words, const u32 (&x)[4], u32 count) {
  const u32 half = count < 2 ? x[0] : count < 4 ? x[1] : count < 6 ? x[2] : x[3];
  store_global_8_if(count & 4, words, x[0], x[1]);
  store_global_4_if(count & 2, words + (count & 4) / 2, count & 4 ? x[2] : x[0]);
  store_global_2_if(count & 1, reinterpret_cast<u16*>(words + count / 2), static_cast<u16>(half));
}

// 16-bit results whose rows begin anywhere. Four neighbouring lanes hold 32 neighbouring columns of a row, eight each from `column` on,
// and the calls for a row follow each other from `first` on; they store [first, end). Lanes take over from each other what lies behind
// multiples of 16 bytes, so that all but the two ends of the row goes to memory 16 bytes at once. A last call beyond `end` stores what
// is left. All lanes of the warp call it; `present`: whether there is such a row. `at` is known when the kernel is compiled.
enum class Along { FIRST, WITHIN, BEYOND };
template <class T>
DEVICE void store_shifted(const Tensor& t, i64 offset, u32 column, u32 first, u32 end, bool present, Along at, const float (&v)[8], Carry& carry) {
  static_assert(sizeof(T) == 2, "");
  T* const place = static_cast<T*>(t.data) + offset + column;
  const u32 shift = reinterpret_cast<u64>(place) / 2 & 7, quad = threadIdx.x & 3, from = (threadIdx.x & 28) | ((threadIdx.x + 3) & 3);
  u32 x[8];  // eight columns before this lane's, and its own
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    x[4 + j] = static_cast<u32>(narrow<T>(v[2 * j]).bits) | static_cast<u32>(narrow<T>(v[2 * j + 1]).bits) << 16;
    const u32 before = __shfl_sync(~0u, x[4 + j], from);
    x[j] = quad == 0 ? carry.word[j] : before;
    carry.word[j] = before;
  }
  // Moved up by `shift` elements: what belongs into the 16 bytes that hold the first of this lane's columns.
#pragma unroll
  for (int j = 7; j > 1; --j) x[j] = shift & 4 ? x[j - 2] : x[j];
#pragma unroll
  for (int j = 7; j > 2; --j) x[j] = shift & 2 ? x[j - 1] : x[j];
#pragma unroll
  for (int j = 7; j > 3; --j) x[j] = shift & 1 ? x[j] << 16 | x[j - 1] >> 16 : x[j];
  const u32 chunk[4] = {x[4], x[5], x[6], x[7]};
  const i32 begin = static_cast<i32>(first), limit = present ? static_cast<i32>(end) : 0;  // below 2³¹
  const i32 low0 = static_cast<i32>(column - 8 * quad - shift), low = low0 + 8 * static_cast<i32>(quad);
  u32* const words0 = reinterpret_cast<u32*>(place - 8 * quad - shift);  // of the first of the four lanes
  if (at != Along::BEYOND && low >= begin && low + 8 <= limit)
    *reinterpret_cast<uint4*>(words0 + 4 * quad) = make_uint4(x[4], x[5], x[6], x[7]);
  store_front(words0 + 4 * quad, chunk, low >= begin && low < limit && low + 8 > limit ? limit - low : 0);
  if (at == Along::FIRST) store_edge(words0, low0, begin, shift == 0 ? begin : limit, chunk);
}

// A row of a table of `rows`. Indices count from the end when negative. One outside the table reads row 0 instead of foreign
// memory and sets the step's status word, unless that is null: the run's results are then not handed out.
DEVICE i64 row_within(i64 i, i64 rows, u32* status) {
  if (i < 0) i += rows;
  if (i >= 0 && i < rows) return i;
  if (status != nullptr) *status = 1;
  return 0;
}

// What an index tensor says, as it stands there.
template <class INDEX> DEVICE i64 table_index(const Tensor& index, i64 offset) {
  return static_cast<i64>(static_cast<const INDEX*>(index.data)[offset]);
}

// Columns that lie in different rows of a table: the row of each is named by an index that moves with the columns.
template <class T, class INDEX>
DEVICE Fetched<T, Column::STRIDED> fetch_rows(const Tensor& t, i64 offset, const Tensor& index, i64 index_offset, i64 rows,
                                              i64 row_stride, u32 column, u32 count, u32* status) {
  const T* p = static_cast<const T*>(t.data) + offset;
  Fetched<T, Column::STRIDED> result;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    result.pack.element[i] = T();
    if (i < count) {
      const i64 row = row_within(table_index<INDEX>(index, index_offset + (column + i) * index.column), rows, status);
      result.pack.element[i] = p[row * row_stride + (column + i) * t.column];
    }
  }
  return result;
}
