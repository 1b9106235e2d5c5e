// Philox4x32 with 7 rounds (Salmon et al. 2011): the words behind every dropout mask, on host and
// device the function that kernels/philox.py defines.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BLIP2FAST_HD __host__ __device__ __forceinline__
#else
#define BLIP2FAST_HD inline
#endif

namespace blip2fast {

constexpr int kPhiloxRounds = 7;

struct PhiloxKey {
  uint32_t low, high, offset;
};

struct PhiloxWords {
  uint32_t word[4];
};

BLIP2FAST_HD PhiloxKey philox_key(const int64_t* state) {
  const uint64_t seed = static_cast<uint64_t>(state[0]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(state[1])};
}

// The four words that serve columns 4 * group to 4 * group + 3 of (row, head).
BLIP2FAST_HD PhiloxWords philox_words(PhiloxKey key, uint32_t group, uint32_t row, uint32_t head) {
  uint32_t c0 = group, c1 = row, c2 = head, c3 = key.offset;
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product_0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product_1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(product_1 >> 32) ^ c1 ^ key.low;
    c1 = static_cast<uint32_t>(product_1);
    c2 = static_cast<uint32_t>(product_0 >> 32) ^ c3 ^ key.high;
    c3 = static_cast<uint32_t>(product_0);
    key.low += 0x9E3779B9u;
    key.high += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace blip2fast
