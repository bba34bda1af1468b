// Matrix instructions: every lane computes its own results. A product of wgmma happens when it is waited for.
#include <math.h>
#include <string.h>

#include <type_traits>
#include <vector>

#include "races.h"
#include "threads.h"

namespace emulator {
namespace {

template <class A, class B> struct same { static constexpr bool value = false; };
template <class A> struct same<A, A> { static constexpr bool value = true; };

using races::Access;
using u16 = unsigned short;

float float_of(u32 bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

// How an operand's elements become numbers. `of`: element i of a register.
struct Half {
  using Bits = u16;
  static constexpr int PER_WORD = 2;
  static float of(u32 bits) {
    const auto narrow = static_cast<u16>(bits);
    _Float16 h;
    memcpy(&h, &narrow, 2);
    return static_cast<float>(h);
  }
};
struct Bfloat16 {
  using Bits = u16;
  static constexpr int PER_WORD = 2;
  static float of(u32 bits) { return float_of(bits << 16); }
};
struct E4m3 {
  using Bits = unsigned char;
  static constexpr int PER_WORD = 4;
  static float of(u32 bits) {
    const u32 magnitude = bits & 0x7f;
    const float value = magnitude == 0x7f ? NAN : float_of(magnitude << 20) * 0x1p120f;
    return bits & 0x80 ? -value : value;
  }
};
struct I8 {
  using Bits = unsigned char;
  static constexpr int PER_WORD = 4;
  static float of(u32 bits) { return static_cast<signed char>(bits); }
};
struct Tf32 {
  using Bits = u32;
  static constexpr int PER_WORD = 1;
  static float of(u32 bits) { return float_of(bits & ~0x1fffu); }  // the instruction does not read the 13 low bits
};
template <class VISIT> void with(Element element, VISIT visit) {
  switch (element) {
    case Element::HALF: return visit(Half());
    case Element::BFLOAT16: return visit(Bfloat16());
    case Element::E4M3: return visit(E4m3());
    case Element::I8: return visit(I8());
    case Element::TF32: return visit(Tf32());
  }
}
template <class T> float part(u32 word, int i) {
  if constexpr (T::PER_WORD == 2) return T::of(word >> 16 * i & 0xffff);
  else return T::of(word);
}

u32 fragments[MAX_THREADS / WARP][WARP][6];

struct Product {
  Element element;
  int n;
  void* d;  // fp32, of I8 integers of 32 bits
  const u32* registers;  // operand A, or null where `a` describes it
  u64 a, b;
  bool accumulate;
  const void* where;
  bool across;  // the rows of b are k
};
using Group = std::vector<Product>;
struct Products {
  Group open;
  std::vector<Group> committed;  // oldest first
} products[MAX_THREADS];
u32 register_operands[MAX_THREADS][4];

// A descriptor's fields (addresses within the block's own shared memory), and where a byte of the operand lies under its swizzle.
struct Operand {
  u32 row_bytes, start, pitch, stride;
  explicit Operand(u64 descriptor) {
    if (descriptor >> 62 == 0) fail("an operand without a swizzle is not emulated");
    row_bytes = 256u >> (descriptor >> 62);
    start = (descriptor & 0x3FFF) << 4;
    pitch = (descriptor >> 16 & 0x3FFF) << 4;
    stride = (descriptor >> 32 & 0x3FFF) << 4;
  }
  u32 swizzled(u32 linear) const { return linear ^ (linear >> 7 & (row_bytes / 16 - 1)) << 4; }
  // Element (row, k) where k runs along the rows.
  u32 along(u32 row, u32 k, u32 bytes) const { return swizzled(start + row / 8 * stride + row % 8 * row_bytes + bytes * k); }
  // Element (k, column) where the rows are k.
  u32 across(u32 k, u32 column, u32 bytes) const {
    const u32 per_row = row_bytes / bytes;
    return swizzled(start + column / per_row * pitch + k / 8 * stride + k % 8 * row_bytes + column % per_row * bytes);
  }
};
// Calls `visit(bytes, how many)` for what a product reads of shared memory. The four warps read it together: the first thread of a
// warpgroup stands for all.
template <class VISIT> void operands_of(const Product& p, VISIT visit) {
  if (current % (4 * WARP)) return;
  const u32 bytes = p.element == Element::TF32 ? 4 : p.element == Element::E4M3 || p.element == Element::I8 ? 1 : 2, depth = 32 / bytes;
  const Operand b(p.b);
  for (u32 column = 0; column < static_cast<u32>(p.n); ++column)
    for (u32 k = 0; k < depth; ++k) {
      if (p.across && column * bytes % 16 == 0) visit(own_shared_memory() + b.across(k, column, bytes), 16u);
      else if (!p.across && k * bytes % 16 == 0) visit(own_shared_memory() + b.along(column, k, bytes), 16u);
    }
  if (p.registers) return;
  const Operand a(p.a);
  for (u32 row = 0; row < 64; ++row)
    for (u32 k = 0; k < depth; k += 16 / bytes) visit(own_shared_memory() + a.along(row, k, bytes), 16u);
}

// Of 8-bit floats the unit aligns the products of an instruction, and the accumulator, with the largest of them, and drops what lies
// below the 13 bits behind its leading one (towards zero). So it is told of sm_90; nobody has said more.
float aligned_sum(float accumulator, const float* products, u32 count) {
  float largest = fabsf(accumulator);
  for (u32 i = 0; i < count; ++i) largest = fmaxf(largest, fabsf(products[i]));
  bool finite = isfinite(accumulator);
  for (u32 i = 0; i < count; ++i) finite = finite && isfinite(products[i]);
  if (largest == 0.0f || !finite) {
    for (u32 i = 0; i < count; ++i) accumulator += products[i];
    return accumulator;
  }
  const int unit = ilogbf(largest) - 13;
  double sum = trunc(ldexp(accumulator, -unit));
  for (u32 i = 0; i < count; ++i) sum += trunc(ldexp(products[i], -unit));
  const double result = ldexp(sum, unit);
  if (result == 0.0) return 0.0f;
  const int last = ilogb(result) - 13;
  return static_cast<float>(ldexp(trunc(ldexp(result, -last)), last));
}

// The columns of operand B, read once for all threads of the warpgroup that multiplies by them. Those of a thread are its place in a
// quad's: `values[place][k][column of them]`.
constexpr u32 MOST_COLUMNS = 256, MOST_DEPTH = 32;
struct Columns {
  Element element;
  int n;
  u64 descriptor;
  bool across;
  float values[4][MOST_DEPTH][MOST_COLUMNS / 4];
};
// Of the products that a warpgroup waits for, in order, as far as it has come.
std::vector<Columns> columns_read[MAX_THREADS / (4 * WARP)];
size_t finished[MAX_THREADS];  // of these, by each thread

template <class T> float value_at(const unsigned char* memory, u32 address) {
  typename T::Bits bits;
  if (address + sizeof bits > SHARED_BYTES) fail("an operand lies outside shared memory");
  memcpy(&bits, memory + address, sizeof bits);
  return T::of(bits);
}

template <class T> void read_columns(Columns& to) {
  constexpr u32 BYTES = sizeof(typename T::Bits), DEPTH = 32 / BYTES;
  const unsigned char* memory = own_shared_memory();
  const Operand b(to.descriptor);
  for (u32 column = 0; column < static_cast<u32>(to.n); ++column)
    for (u32 k = 0; k < DEPTH; ++k)
      to.values[column % 8 / 2][k][column / 8 * 2 + column % 2] =
          value_at<T>(memory, to.across ? b.across(k, column, BYTES) : b.along(column, k, BYTES));
}

// Operand B of the product that the present thread finishes next.
template <class T> const Columns& next_columns(const Product& p) {
  auto& read = columns_read[current / (4 * WARP)];
  const size_t number = finished[current]++;
  if (read.size() <= number) read.resize(number + 1);
  Columns& b = read[number];
  if (b.n != p.n || b.descriptor != p.b || b.element != p.element || b.across != p.across) {
    b.element = p.element;
    b.n = p.n;
    b.descriptor = p.b;
    b.across = p.across;
    read_columns<T>(b);
  }
  return b;
}

// Two rows, eight below each other, times the columns of one thread of a quad.
template <class T> void multiply_rows(const Product& p, const float (&rows)[2][32 / sizeof(typename T::Bits)]) {
  constexpr u32 BYTES = sizeof(typename T::Bits), DEPTH = 32 / BYTES;
  using Sum = std::conditional_t<same<T, I8>::value, u32, float>;  // u32 wraps
  const auto& columns = next_columns<T>(p).values[current % 4];
  const auto count = static_cast<u32>(p.n) / 4;
  auto* d = static_cast<Sum*>(p.d);
  for (u32 half = 0; half < 2; ++half) {
    Sum sums[MOST_COLUMNS / 4];
    const auto place = [half](u32 column) { return column / 2 * 4 + 2 * half + column % 2; };
    for (u32 i = 0; i < count; ++i) sums[i] = p.accumulate ? d[place(i)] : Sum(0);
    if constexpr (same<T, E4m3>::value) {
      for (u32 i = 0; i < count; ++i) {
        float products[DEPTH];
        for (u32 k = 0; k < DEPTH; ++k) products[k] = rows[half][k] * columns[k][i];
        sums[i] = aligned_sum(sums[i], products, DEPTH);
      }
    } else {
      for (u32 k = 0; k < DEPTH; ++k)
        for (u32 i = 0; i < count; ++i) {
          const float product = rows[half][k] * columns[k][i];
          if constexpr (same<T, I8>::value) sums[i] += static_cast<u32>(static_cast<int>(product));
          else sums[i] += product;
        }
    }
    for (u32 i = 0; i < count; ++i) d[place(i)] = sums[i];
  }
}

template <class T> void multiply(const Product& p) {
  constexpr u32 BYTES = sizeof(typename T::Bits), DEPTH = 32 / BYTES;
  const auto thread_in_group = static_cast<u32>(current % (4 * WARP));
  const u32 first_row = thread_in_group / 32 * 16 + thread_in_group % 32 / 4;
  const unsigned char* memory = own_shared_memory();
  const Operand a(p.a);
  float rows[2][DEPTH];
  for (u32 half = 0; half < 2; ++half)
    for (u32 k = 0; k < DEPTH; ++k) rows[half][k] = value_at<T>(memory, a.along(first_row + 8 * half, k, BYTES));
  multiply_rows<T>(p, rows);
}

// A thread needs the registers of its quad: each publishes its own, and computes once all of its warp have.
template <class T> void multiply_registers(const Product& p) {
  static_assert(sizeof(typename T::Bits) == 2, "");
  memcpy(register_operands[current], p.registers, sizeof register_operands[current]);
  meet_warp();
  float rows[2][16];
  for (u32 half = 0; half < 2; ++half)
    for (u32 k = 0; k < 16; ++k)
      rows[half][k] = part<T>(register_operands[current / 4 * 4 + static_cast<int>(k % 8 / 2)][half + 2 * (k / 8)], k & 1);
  multiply_rows<T>(p, rows);
  meet_warp();
}

void begin(const Product& p) {
  operands_of(p, [&](const unsigned char* at, u32 bytes) { races::begin(Access::READ, at, bytes, p.where); });
  products[current].open.push_back(p);
}
void finish(const Product& p) {
  operands_of(p, [&](const unsigned char* at, u32 bytes) { races::finish(Access::READ, at, bytes, p.where); });
  with(p.element, [&](auto element) {
    using T = decltype(element);
    if (!p.registers) multiply<T>(p);
    else if constexpr (T::PER_WORD == 2) multiply_registers<T>(p);
    else fail("operands of wgmma in registers are of 16 bits");
  });
}

}  // namespace

void forget_products(int thread) {
  products[thread].open.clear();
  products[thread].committed.clear();
}

void mma(Element element, float* d, const u32* a, u32 b0, u32 b1) {
  const int warp = current / WARP, lane = current % WARP;
  auto& all = fragments[warp];
  memcpy(all[lane], a, 4 * sizeof(u32));
  all[lane][4] = b0;
  all[lane][5] = b1;
  meet_warp();
  with(element, [&](auto kind) {
    using T = decltype(kind);
    constexpr int PER_WORD = T::PER_WORD, HALF = 4 * PER_WORD;  // of k
    if constexpr (PER_WORD == 4) fail("the kernels make halves of 8-bit floats for mma.sync");
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + (i & 1);
      float sum = d[i];
      for (int k = 0; k < 2 * HALF; ++k) {
        const u32 a_word = all[row % 8 * 4 + k % HALF / PER_WORD][row / 8 + 2 * (k / HALF)];
        const u32 b_word = all[column * 4 + k % HALF / PER_WORD][4 + k / HALF];
        sum += part<T>(a_word, k % PER_WORD) * part<T>(b_word, k % PER_WORD);
      }
      d[i] = sum;
    }
  });
  meet_warp();
}

void wgmma(Element element, int n, void* d, u64 a, u64 b, bool accumulate, const void* where) {
  begin({element, n, d, nullptr, a, b, accumulate, where, false});
}
void wgmma_across(Element element, int n, float* d, u64 a, u64 b, bool accumulate, const void* where) {
  if (element != Element::HALF && element != Element::BFLOAT16) fail("wgmma transposes operands of 16 bits only");
  begin({element, n, d, nullptr, a, b, accumulate, where, true});
}
void wgmma_registers(Element element, int n, float* d, const u32* a, u64 b, bool accumulate, const void* where) {
  begin({element, n, d, a, 0, b, accumulate, where, true});
}
void wgmma_commit() {
  meet_warp();  // a warp issues its products together
  products[current].committed.push_back(std::move(products[current].open));
  products[current].open.clear();
}
void wgmma_wait(int pending) {
  auto& groups = products[current].committed;
  if (groups.size() <= static_cast<size_t>(pending)) return;
  // A product is the warpgroup's: nobody is through before all of its threads have come to it and have their results.
  columns_read[current / (4 * WARP)].clear();
  finished[current] = 0;
  meet_warpgroup();
  while (groups.size() > static_cast<size_t>(pending)) {
    for (const Product& p : groups.front()) finish(p);
    groups.erase(groups.begin());
  }
  meet_warpgroup();
}

}  // namespace emulator
