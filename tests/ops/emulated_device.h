// csrc/device.h for the host: every thread of a block runs as a coroutine, and the lanes of a warp
// meet at each exchange. Written from PTX's definitions, not from the kernels: it checks what the
// kernels do with indices, masks and fragments, but neither speed nor memory ordering.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "emulated_formats.h"

#define BLIP2FAST_KERNEL(threads, blocks) void
#define BLIP2FAST_DEVICE inline
#define BLIP2FAST_UNROLL

namespace blip2fast {

struct float2 {
  float x, y;
};

namespace emulated {

enum class Exchange {
  kNone,
  kShuffle,
  kTranspose,
  kMma,
  kLoad,
  kLoadTransposed,
  kWarpBarrier,
  kProduct,  // emulated_warpgroup.h
};

// What a lane brings to an exchange; two sets, because a fast lane may reach the next exchange
// before a slow one has read this one.
struct Slot {
  Exchange kind = Exchange::kNone;
  int mask = 0;
  uint32_t value[6] = {};
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

// Of 16 bytes of shared memory: what products of warpgroups may find there, and how many threads'
// products read them now.
enum class Arrival : uint8_t { kUnknown, kCopying, kLanded, kPublished };
struct Piece {
  Arrival arrival = Arrival::kUnknown;
  int readers = 0;
};

// A thread's part of the products of its warpgroup.
struct Products {
  float* accumulator = nullptr;
  std::vector<float> value;  // of the accumulator, once the products are done
  std::vector<size_t> open;  // pieces that they read, not yet in a group
  std::deque<std::vector<size_t>> groups;
  // left operands in registers, where they are and what they must stay
  std::vector<std::pair<const uint32_t*, std::array<uint32_t, 4>>> registers;
  bool begun = false;  // the registers are fenced
  size_t issued = 0;
};

struct Thread {
  ucontext_t context;
  std::vector<size_t> landed;  // pieces whose copies this thread has waited for, not published
  Products products;
  // copies happen when they are waited for, as late as the hardware may make them visible
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  std::unique_ptr<char[]> stack;
  int64_t arrived = 0;  // exchanges of the warp, and barriers of the block
  int64_t barriers = 0;
  bool done = false;
  Slot slot[2];
};

struct Block {
  int64_t index = 0;
  int current = 0;
  int64_t progress = 0;  // arrivals of any kind
  std::vector<Thread> threads;
  ucontext_t scheduler;
  std::function<void()> body;
  std::vector<char> shared;
  std::vector<Piece> pieces;  // of shared
  // emulated_warpgroup.h: the descriptors of every product of a warpgroup, named barriers
  std::map<int, std::vector<std::array<uint64_t, 2>>> issued;
  struct NamedBarrier {
    int threads = 0, arrived = 0;
    int64_t completed = 0;
  };
  std::map<int, NamedBarrier> named;

  size_t piece(const void* at) const {
    return (static_cast<const char*>(at) - shared.data()) / 16;
  }
};

// Compute capability of the device, as compute_capability() gives it.
inline int& capability() {
  static int value = 80;
  return value;
}

inline Block*& running() {
  static thread_local Block* block = nullptr;
  return block;
}

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "emulated device: %s\n", message);
  std::abort();
}

inline void yield() {
  Block& block = *running();
  swapcontext(&block.threads[block.current].context, &block.scheduler);
}

inline void enter() {
  Block& block = *running();
  block.body();
  Thread& thread = block.threads[block.current];
  if (!thread.products.open.empty() || !thread.products.groups.empty())
    fail("a thread left the kernel with products under way");
  thread.done = true;
  ++block.progress;
  swapcontext(&block.threads[block.current].context, &block.scheduler);
}

// Wait until all lanes of this warp are here, for the same kind of exchange; gives all their slots.
struct Lanes {
  const Slot* of[32];
};
inline Lanes meet(Exchange kind, int mask, const uint32_t* values, int count) {
  Block& block = *running();
  const int self = block.current, first = self / 32 * 32;
  Thread& thread = block.threads[self];
  const int parity = thread.arrived % 2;
  Slot& mine = thread.slot[parity];
  mine.kind = kind;
  mine.mask = mask;
  std::memcpy(mine.value, values, sizeof(uint32_t) * count);
  const int64_t meeting = ++thread.arrived;
  ++block.progress;
  Lanes lanes;
  for (int lane = 0; lane < 32; ++lane) {
    Thread& other = block.threads[first + lane];
    while (other.arrived < meeting) {
      if (other.done) fail("a lane left the kernel while others wait for it");
      yield();
    }
    lanes.of[lane] = &other.slot[parity];
    if (lanes.of[lane]->kind != kind || lanes.of[lane]->mask != mask)
      fail("the lanes of a warp disagree about an exchange");
  }
  return lanes;
}

// Until all lanes wait for others, or are done; whether any is left.
inline bool run_warp(Block& block, size_t warp) {
  const size_t end = std::min(32 * warp + 32, block.threads.size());
  for (;;) {
    const int64_t before = block.progress;
    bool left = false;
    for (size_t i = 32 * warp; i < end; ++i) {
      if (block.threads[i].done) continue;
      left = true;
      block.current = static_cast<int>(i);
      swapcontext(&block.scheduler, &block.threads[i].context);
    }
    if (!left || block.progress == before) return left;
  }
}

inline void run_block(Block& block) {
  constexpr int kStack = 128 * 1024;
  running() = &block;
  block.pieces.assign(block.shared.size() / 16, {});
  block.issued.clear();
  block.named.clear();
  for (Thread& thread : block.threads) {
    thread.arrived = thread.barriers = 0;
    thread.done = false;
    thread.groups.clear();
    thread.open.clear();
    thread.landed.clear();
    thread.products = {};
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  // a warp goes as far as it can before another does, so that a missing barrier shows; the first
  // warp is ahead in one block, the last in the next
  const size_t warps = (block.threads.size() + 31) / 32;
  for (bool left = true; left;) {
    const int64_t before = block.progress;
    left = false;
    for (size_t i = 0; i < warps; ++i) left |= run_warp(block, block.index % 2 ? warps - 1 - i : i);
    if (left && block.progress == before) fail("the threads wait for each other");
  }
  for (const auto& [id, barrier] : block.named)
    if (barrier.arrived > 0) fail("the block ends with threads of a barrier missing");
  running() = nullptr;
}

}  // namespace emulated

inline int thread_index() {
  return emulated::running()->current;
}
inline int64_t block_index() {
  return emulated::running()->index;
}

template <typename Format>
uint32_t pack(float low, float high) {
  return emulated::encode<Format>(low) | static_cast<uint32_t>(emulated::encode<Format>(high))
                                             << 16;
}
template <typename Format>
float2 unpack(uint32_t pair) {
  return {emulated::decode<Format>(static_cast<uint16_t>(pair)),
          emulated::decode<Format>(static_cast<uint16_t>(pair >> 16))};
}

inline int shuffle_xor(int value, int mask) {
  const uint32_t bits = static_cast<uint32_t>(value);
  const auto lanes = emulated::meet(emulated::Exchange::kShuffle, mask, &bits, 1);
  return static_cast<int>(lanes.of[(thread_index() % 32) ^ mask]->value[0]);
}

inline int compute_capability() {
  return emulated::capability();
}
inline int multiprocessors() {
  return 132;
}
inline int shared_limit() {
  switch (emulated::capability()) {
    case 80:
      return 163 * 1024;
    case 90:
    case 100:
      return 227 * 1024;
    case 75:
      return 64 * 1024;
    default:
      return 99 * 1024;
  }
}

inline char* shared_memory() {
  return emulated::running()->shared.data();
}

inline void block_barrier() {
  emulated::Block& block = *emulated::running();
  const int64_t meeting = ++block.threads[block.current].barriers;
  ++block.progress;
  for (emulated::Thread& other : block.threads) {
    while (other.barriers < meeting) {
      if (other.done) emulated::fail("a thread left the kernel while others wait for it");
      emulated::yield();
    }
  }
}

inline void copy16_async(void* shared, const void* global, bool valid) {
  emulated::Block& block = *emulated::running();
  const char* at = static_cast<char*>(shared);
  const char* begin = block.shared.data();
  if (at < begin || at + 16 > begin + block.shared.size() || (at - begin) % 16 != 0)
    emulated::fail("a copy outside shared memory, or not at 16 bytes");
  emulated::Piece& piece = block.pieces[block.piece(shared)];
  if (piece.readers > 0) emulated::fail("a copy to memory that products under way read");
  piece.arrival = emulated::Arrival::kCopying;
  block.threads[block.current].open.push_back({shared, valid ? global : nullptr});
}
inline void copy_commit() {
  emulated::Block& block = *emulated::running();
  emulated::Thread& thread = block.threads[block.current];
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int LATEST>
void copy_wait() {
  emulated::Block& block = *emulated::running();
  emulated::Thread& thread = block.threads[block.current];
  auto& groups = thread.groups;
  for (; groups.size() > LATEST; groups.pop_front()) {
    for (const emulated::Copy& copy : groups.front()) {
      if (copy.from == nullptr)
        std::memset(copy.to, 0, 16);
      else
        std::memcpy(copy.to, copy.from, 16);
      block.pieces[block.piece(copy.to)].arrival = emulated::Arrival::kLanded;
      thread.landed.push_back(block.piece(copy.to));
    }
  }
}

namespace emulated {
inline void load(uint32_t (&matrix)[4], const void* row, bool transposed) {
  uint32_t address[2];
  std::memcpy(address, &row, sizeof row);
  const auto lanes = meet(transposed ? Exchange::kLoadTransposed : Exchange::kLoad, 0, address, 2);
  const int lane = thread_index() % 32, r = lane / 4, c = lane % 4 * 2;
  const auto element = [&](int i, int at_row, int at_column) {
    const uint16_t* data;
    std::memcpy(&data, lanes.of[8 * i + at_row]->value, sizeof data);
    return static_cast<uint32_t>(data[at_column]);
  };
  for (int i = 0; i < 4; ++i) {
    matrix[i] = transposed ? element(i, c, r) | element(i, c + 1, r) << 16
                           : element(i, r, c) | element(i, r, c + 1) << 16;
  }
  // the rows must be read before a lane goes on and another may write to them
  meet(Exchange::kWarpBarrier, 1, nullptr, 0);
}
}  // namespace emulated

inline void load_matrices(uint32_t (&matrix)[4], const void* row) {
  emulated::load(matrix, row, false);
}
inline void load_matrices_transposed(uint32_t (&matrix)[4], const void* row) {
  emulated::load(matrix, row, true);
}

inline float shuffle_xor(float value, int mask) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const auto lanes = emulated::meet(emulated::Exchange::kShuffle, mask, &bits, 1);
  bits = lanes.of[(thread_index() % 32) ^ mask]->value[0];
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void prefetch(const void* address) {
  (void)*static_cast<const volatile char*>(address);  // must be an address one may read
}

inline void loads_stay_below() {
  emulated::meet(emulated::Exchange::kWarpBarrier, 0, nullptr, 0);
}

inline uint32_t transpose_8x8(uint32_t pair) {
  const auto lanes = emulated::meet(emulated::Exchange::kTranspose, 0, &pair, 1);
  const int lane = thread_index() % 32, row = lane / 4, column = lane % 4 * 2;
  // element (r, c) lies in lane 4r + c/2, half c % 2
  const auto element = [&](int r, int c) {
    return lanes.of[4 * r + c / 2]->value[0] >> (16 * (c % 2)) & 0xFFFF;
  };
  return element(column, row) | element(column + 1, row) << 16;
}

template <typename Format>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t values[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto lanes = emulated::meet(emulated::Exchange::kMma, 0, values, 6);
  const auto half = [](uint32_t word, int which) {
    return emulated::decode<Format>(static_cast<uint16_t>(word >> (16 * which)));
  };
  const auto left = [&](int row, int k) {
    return half(lanes.of[row % 8 * 4 + k % 8 / 2]->value[row / 8 + k / 8 * 2], k % 2);
  };
  const auto right = [&](int k, int column) {
    return half(lanes.of[column * 4 + k % 8 / 2]->value[4 + k / 8], k % 2);
  };
  const int lane = thread_index() % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) sum += static_cast<double>(left(row, k)) * right(k, column);
    c[i] = static_cast<float>(sum);
  }
}

template <typename Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, void*,
            Params params, int shared_bytes = 0) {
  if (shared_bytes > shared_limit())
    throw launch_error(name, blocks, threads, shared_bytes, "more than a block may have");
  emulated::Block block;
  block.shared = std::vector<char>(shared_bytes);
  block.threads = std::vector<emulated::Thread>(threads);
  block.body = [&] { kernel(params); };
  for (int64_t index = 0; index < blocks; ++index) {
    block.index = index;
    std::fill(block.shared.begin(), block.shared.end(), '\xFF');  // NaN until written
    emulated::run_block(block);
  }
}

}  // namespace blip2fast
