// csrc/device.h for the host: every thread of a block runs as a coroutine, and the lanes of a warp
// meet at each exchange. Written from PTX's definitions, not from the kernels: it checks what the
// kernels do with indices, masks and fragments, but neither speed nor memory ordering.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define BLIP2FAST_KERNEL(threads, blocks) void
#define BLIP2FAST_DEVICE inline
#define BLIP2FAST_UNROLL

namespace blip2fast {

struct Half {};
struct BFloat16 {};
struct float2 {
  float x, y;
};

namespace emulated {

enum class Exchange { kNone, kShuffle, kTranspose, kMma, kLoad, kLoadTransposed, kWarpBarrier };

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

struct Thread {
  ucontext_t context;
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
  std::vector<Thread> threads;
  ucontext_t scheduler;
  std::function<void()> body;
  std::vector<char> shared;
};

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
  block.threads[block.current].done = true;
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

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits >> 15) << 31;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = fraction ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  }
  return sign ? -magnitude : magnitude;
}

inline uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7E00;
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  // nearbyint rounds to nearest even, as cvt.rn does
  if (magnitude < 6.103515625e-5f)
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude = f * 2^exponent, f in [0.5, 1)
  const int fraction = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) + (fraction - 1024));
}

inline float bfloat_to_float(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline uint16_t float_to_bfloat(float value) {
  uint32_t word;
  std::memcpy(&word, &value, 4);
  if (std::isnan(value)) return 0x7FC0;
  return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

template <typename Format>
float decode(uint16_t bits);
template <>
inline float decode<Half>(uint16_t bits) {
  return half_to_float(bits);
}
template <>
inline float decode<BFloat16>(uint16_t bits) {
  return bfloat_to_float(bits);
}
template <typename Format>
uint16_t encode(float value);
template <>
inline uint16_t encode<Half>(float value) {
  return float_to_half(value);
}
template <>
inline uint16_t encode<BFloat16>(float value) {
  return float_to_bfloat(value);
}

inline void run_block(Block& block) {
  constexpr int kStack = 128 * 1024;
  running() = &block;
  for (Thread& thread : block.threads) {
    thread.arrived = thread.barriers = 0;
    thread.done = false;
    thread.groups.clear();
    thread.open.clear();
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  for (size_t left = block.threads.size(); left > 0;) {
    left = 0;
    for (size_t i = 0; i < block.threads.size(); ++i) {
      if (block.threads[i].done) continue;
      ++left;
      block.current = static_cast<int>(i);
      swapcontext(&block.scheduler, &block.threads[i].context);
    }
  }
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

inline char* shared_memory() {
  return emulated::running()->shared.data();
}

inline void block_barrier() {
  emulated::Block& block = *emulated::running();
  const int64_t meeting = ++block.threads[block.current].barriers;
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
  auto& groups = block.threads[block.current].groups;
  for (; groups.size() > LATEST; groups.pop_front()) {
    for (const emulated::Copy& copy : groups.front()) {
      if (copy.from == nullptr)
        std::memset(copy.to, 0, 16);
      else
        std::memcpy(copy.to, copy.from, 16);
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
void launch(void (*kernel)(Params), int64_t blocks, int threads, void*, Params params,
            int shared_bytes = 0) {
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
