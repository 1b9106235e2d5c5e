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

// A left or right operand in shared memory, its inner index contiguous (K-major), as
//   bits 13-0: address / 16, 29-16: leading offset / 16 (not used by this layout),
//   45-32: offset from one group of 8 rows to the next / 16, 51-49: base offset, 63-62: swizzle.
struct Operand {
  uint32_t start, next_eight_rows;

  explicit Operand(uint64_t descriptor) {
    const auto field = [&](int low, int bits) {
      return static_cast<uint32_t>(descriptor >> low & ((uint64_t{1} << bits) - 1));
    };
    start = field(0, 14) * 16;
    next_eight_rows = field(32, 14) * 16;
    if (field(62, 2) != 1) fail("a product whose operand is not in the 128-byte swizzle");
    if (field(49, 3) != 0 || (start >> 7 & 7) != 0)
      fail("an operand that begins within a swizzle pattern");
    if ((descriptor & ~0xC00E3FFF3FFF3FFFull) != 0) fail("a descriptor with unknown bits");
  }
  // Offset in shared memory of 16-bit element (row, k), k below 16.
  size_t offset(int row, int k) const {
    uint32_t address = start + row / 8 * next_eight_rows + row % 8 * 128 + 2 * k;
    address ^= (address >> 7 & 7) << 4;
    if (address < kSharedBegin) fail("an operand outside shared memory");
    return address - kSharedBegin;
  }
};

// The 16 elements of a row, and the pieces they came from.
template <typename Format>
std::array<float, 16> read_row(const Operand& operand, int row, std::vector<size_t>& pieces) {
  Block& block = *running();
  std::array<float, 16> values;
  for (int k = 0; k < 16; ++k) {
    const size_t at = operand.offset(row, k);
    if (at + 2 > block.shared.size()) fail("an operand outside shared memory");
    if (k % 8 == 0) {
      Piece& piece = block.pieces[at / 16];
      if (piece.arrival == Arrival::kCopying) fail("a product with what is still being copied");
      if (piece.arrival == Arrival::kLanded) fail("a product with copies that were not published");
      if (piece.arrival == Arrival::kUnknown)
        fail("a product with memory that nothing was copied to");
      ++piece.readers;
      pieces.push_back(at / 16);
    }
    uint16_t bits;
    std::memcpy(&bits, &block.shared[at], 2);
    values[k] = decode<Format>(bits);
  }
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
  Products& mine = self().products;
  if (mine.accumulator != accumulator) fail("one accumulator at a time is emulated");
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

template <typename Format>
void multiply_async(float (&c)[128], uint64_t a, uint64_t b, bool add) {
  using namespace emulated;
  const auto low = [](uint64_t word) { return static_cast<uint32_t>(word); };
  together({2, low(a), low(a >> 32), low(b), low(b >> 32), add});
  Block& block = *running();
  Products& mine = self().products;
  const int warpgroup = block.current / 128, warp = block.current / 32 % 4,
            lane = block.current % 32;
  // the four warps issue the same products, each when it gets there
  auto& issued = block.issued[warpgroup];
  if (mine.issued == issued.size()) issued.push_back({a, b});
  if (issued[mine.issued++] != std::array<uint64_t, 2>{a, b})
    fail("the warps of a warpgroup disagree about a product");
  if (lane == 0) ++products_issued();

  if (!mine.begun) fail("a product whose accumulator is not fenced");
  if (mine.open.empty() && mine.groups.empty()) {
    mine.accumulator = c;
    mine.value.assign(c, c + 128);
  }
  check_accumulator(c);
  const Operand left(a), right(b);
  std::array<std::array<float, 16>, 2> rows;
  for (int half = 0; half < 2; ++half)
    rows[half] = read_row<Format>(left, 16 * warp + lane / 4 + 8 * half, mine.open);
  for (int column = 0; column < 256; ++column) {
    if (column % 8 / 2 != lane % 4) continue;
    const auto values = read_row<Format>(right, column, mine.open);
    for (int half = 0; half < 2; ++half) {
      float& to = mine.value[column / 8 * 4 + 2 * half + column % 2];
      double sum = add ? to : 0.0;
      for (int k = 0; k < 16; ++k) sum += static_cast<double>(rows[half][k]) * values[k];
      to = static_cast<float>(sum);
    }
  }
  std::fill(c, c + 128, std::numeric_limits<float>::quiet_NaN());
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
