// csrc/warpgroup.h for the host, from PTX's definition of wgmma: the fields of a descriptor, the
// 128-byte swizzle on the bits of an address, the accumulator's layout. Products are asynchronous:
// accumulators are NaN until they are waited for, and what they read may not change before. A
// product that the hardware could compute otherwise, for want of a fence, a wait or a barrier, ends
// the program.
#pragma once

#include <limits>

#include "emulated_device.h"

namespace blip2fast {

namespace emulated {

// Where shared memory begins among shared addresses; 1024-aligned, as csrc/device.h declares it.
constexpr uint32_t kSharedBegin = 1024;

// Products of all launches so far, one a warp.
inline int64_t& products_issued() {
  static int64_t count = 0;
  return count;
}

// An operand in shared memory in the 128-byte swizzle:
//   bits 13-0: address / 16, 29-16: leading offset / 16, 45-32: stride offset / 16, 51-49: base
//   offset, 63-62: swizzle.
// Inner index contiguous (K-major): rows of 128 bytes, the stride from 8 of them to the next 8, the
// leading offset without use. Else (MN-major, `transposed`): for each k 64 outer elements in 128
// bytes, the stride from 8 k to the next 8, the leading offset from 64 outer elements to the next.
struct Operand {
  uint32_t start, leading, stride;
  bool transposed;

  explicit Operand(uint64_t descriptor, bool is_transposed = false) : transposed(is_transposed) {
    const auto field = [&](int first, int bits) {
      return static_cast<uint32_t>(descriptor >> first & ((uint64_t{1} << bits) - 1));
    };
    start = field(0, 14) * 16;
    leading = field(16, 14) * 16;
    stride = field(32, 14) * 16;
    if (field(62, 2) != 1) fail("a product whose operand is not in the 128-byte swizzle");
    if (field(49, 3) != 0 || (start >> 7 & 7) != 0)
      fail("an operand that begins within a swizzle pattern");
    if ((descriptor & ~0xC00E3FFF3FFF3FFFull) != 0) fail("a descriptor with unknown bits");
  }
  // Offset in shared memory of 16-bit element (outer, k), k below 16.
  size_t offset(int outer, int k) const {
    uint32_t address = start;
    if (transposed)
      address += outer / 64 * leading + k / 8 * stride + k % 8 * 128 + outer % 64 * 2;
    else
      address += outer / 8 * stride + outer % 8 * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
    if (address < kSharedBegin) fail("an operand outside shared memory");
    return address - kSharedBegin;
  }
};

// An element, whose 16-byte piece is noted as being read.
template <typename Format>
float read_element(size_t at, std::vector<size_t>& pieces) {
  Block& block = *running();
  if (at + 2 > block.shared.size()) fail("an operand outside shared memory");
  Piece& piece = block.pieces[at / 16];
  if (piece.arrival == Arrival::kCopying) fail("a product with what is still being copied");
  if (piece.arrival == Arrival::kLanded) fail("a product with copies that were not published");
  if (piece.arrival == Arrival::kUnknown) fail("a product with memory that nothing was copied to");
  ++piece.readers;
  pieces.push_back(at / 16);
  uint16_t bits;
  std::memcpy(&bits, &block.shared[at], 2);
  return decode<Format>(bits);
}

template <typename Format>
std::array<float, 16> read_row(const Operand& operand, int row, std::vector<size_t>& pieces) {
  std::array<float, 16> values;
  for (int k = 0; k < 16; ++k) values[k] = read_element<Format>(operand.offset(row, k), pieces);
  return values;
}

inline Thread& self() {
  return running()->threads[running()->current];
}

// A .sync.aligned instruction: the whole warp, with the same operands.
inline void together(std::array<uint32_t, 6> values) {
  const Lanes lanes = meet(Exchange::kProduct, 0, values.data(), 6);
  for (const Slot* slot : lanes.of) {
    if (!std::equal(values.begin(), values.end(), slot->value))
      fail("the lanes of a warp disagree about a product");
  }
}

inline void check_accumulator(const float* accumulator) {
  const Products& mine = self().products;
  if (mine.issued > 0 && mine.accumulator != accumulator)
    fail("one accumulator at a time is emulated");
}

}  // namespace emulated

inline uint32_t shared_address(const void* shared) {
  return emulated::kSharedBegin + static_cast<uint32_t>(static_cast<const char*>(shared) -
                                                        emulated::running()->shared.data());
}

inline void begin_products() {
  emulated::together({1});
  emulated::self().products.begun = true;
}

namespace emulated {

// What every product begins with; `left` is the descriptor of its left operand, or 0: registers.
inline Products& issue(float (&c)[128], uint64_t left, uint64_t right) {
  Block& block = *running();
  Products& mine = self().products;
  // the four warps issue the same products, each when it gets there
  auto& issued = block.issued[block.current / 128];
  if (mine.issued == issued.size()) issued.push_back({left, right});
  if (issued[mine.issued++] != std::array<uint64_t, 2>{left, right})
    fail("the warps of a warpgroup disagree about a product");
  if (block.current % 32 == 0) ++products_issued();
  if (!mine.begun) fail("a product whose accumulator is not fenced");
  if (mine.open.empty() && mine.groups.empty()) {
    mine.accumulator = c;
    mine.value.assign(c, c + 128);
  }
  check_accumulator(c);
  return mine;
}

// Add products of rows g and g + 8 of the warp to this lane's part of the accumulator.
using Sixteen = std::array<float, 16>;
template <typename Column>
void add_products(float (&c)[128], const std::array<Sixteen, 2>& rows, const Column& column_of,
                  bool add) {
  Products& mine = self().products;
  for (int column = 0; column < 256; ++column) {
    if (column % 8 / 2 != running()->current % 4) continue;
    const Sixteen values = column_of(column);
    for (int half = 0; half < 2; ++half) {
      float& to = mine.value[column / 8 * 4 + 2 * half + column % 2];
      double sum = add ? to : 0.0;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(rows[half][k]) * values[k];
      to = static_cast<float>(sum);
    }
  }
  std::fill(c, c + 128, std::numeric_limits<float>::quiet_NaN());
}

inline uint32_t low(uint64_t word) {
  return static_cast<uint32_t>(word);
}

}  // namespace emulated

template <typename Format>
void multiply_async(float (&c)[128], uint64_t a, uint64_t b, bool add) {
  using namespace emulated;
  together({2, low(a), low(a >> 32), low(b), low(b >> 32), add});
  Products& mine = issue(c, a, b);
  const Operand left(a), right(b);
  const int row = running()->current / 32 % 4 * 16 + running()->current % 32 / 4;
  const std::array<Sixteen, 2> rows = {read_row<Format>(left, row, mine.open),
                                       read_row<Format>(left, row + 8, mine.open)};
  add_products(
      c, rows, [&](int column) { return read_row<Format>(right, column, mine.open); }, add);
}

template <typename Format>
void multiply_registers_async(float (&c)[128], const uint32_t (&a)[4], uint64_t b) {
  using namespace emulated;
  together({5, low(b), low(b >> 32)});
  const Lanes lanes = meet(Exchange::kProduct, 1, a, 4);
  Products& mine = issue(c, 0, b);
  const Operand right(b, true);
  // element k of row g + 8 half lies in lane 4g + k % 8 / 2, word half + 2 (k / 8), its half k % 2
  std::array<Sixteen, 2> rows;
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      const int lane = running()->current % 32 / 4 * 4 + k % 8 / 2;
      const uint32_t word = lanes.of[lane]->value[half + k / 8 * 2];
      rows[half][k] = decode<Format>(static_cast<uint16_t>(word >> (16 * (k % 2))));
    }
  }
  mine.registers.push_back({a, {a[0], a[1], a[2], a[3]}});
  add_products(
      c, rows,
      [&](int column) {
        Sixteen values;
        for (int k = 0; k < 16; ++k)
          values[k] = read_element<Format>(right.offset(column, k), mine.open);
        return values;
      },
      true);
}

inline void commit_products() {
  using namespace emulated;
  together({3});
  Products& mine = self().products;
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

template <int LATEST>
void wait_products() {
  using namespace emulated;
  together({4, LATEST});
  Products& mine = self().products;
  bool any = false;
  for (; mine.groups.size() > LATEST; mine.groups.pop_front(), any = true) {
    for (const size_t piece : mine.groups.front()) --running()->pieces[piece].readers;
  }
  if (!any || !mine.groups.empty() || !mine.open.empty()) return;
  for (int i = 0; i < 128; ++i) {
    if (!std::isnan(mine.accumulator[i]))
      fail("an accumulator was written while products were under way");
    mine.accumulator[i] = mine.value[i];
  }
  for (const auto& [registers, values] : mine.registers)
    if (!std::equal(values.begin(), values.end(), registers))
      fail("operand registers were written while products under way read them");
  mine.registers.clear();
  mine.begun = false;  // the registers may be used now
}

inline void finish_products(float (&c)[128]) {
  emulated::check_accumulator(c);
  wait_products<0>();
}

inline void publish_copies() {
  emulated::Thread& thread = emulated::self();
  for (const size_t at : thread.landed) {
    emulated::Piece& piece = emulated::running()->pieces[at];
    if (piece.arrival == emulated::Arrival::kLanded) piece.arrival = emulated::Arrival::kPublished;
  }
  thread.landed.clear();
}

namespace emulated {
// Count this thread; the number of completions of the barrier that its wait ends with.
inline int64_t arrive(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32 != 0)
    fail("barrier: a number from 1 to 15, of whole warps");
  Block::NamedBarrier& barrier = running()->named[id];
  if (barrier.arrived > 0 && barrier.threads != threads) fail("threads disagree about a barrier");
  barrier.threads = threads;
  ++running()->progress;
  const int64_t meeting = barrier.completed + 1;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.completed;
  }
  return meeting;
}
}  // namespace emulated

inline void barrier_wait(int id, int threads) {
  const int64_t meeting = emulated::arrive(id, threads);
  while (emulated::running()->named[id].completed < meeting) emulated::yield();
}
inline void barrier_arrive(int id, int threads) {
  emulated::arrive(id, threads);
}

}  // namespace blip2fast

// For tests, which load the library: what device it pretends to be, what it has computed.
extern "C" {
__attribute__((used, visibility("default"))) inline void blip2fast_emulate(int capability) {
  blip2fast::emulated::capability() = capability;
}
__attribute__((used, visibility("default"))) inline int64_t blip2fast_emulated_products() {
  return blip2fast::emulated::products_issued();
}
}
