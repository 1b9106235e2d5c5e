#include "philox_cpu.h"

#include <algorithm>
#include <cstring>

// one binary, the widest vectors of the machine that runs it
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#define BLIP2FAST_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define BLIP2FAST_CLONES
#endif

namespace blip2fast {
namespace {

constexpr int64_t kCounters = 128;  // computed together, each for four columns

struct Counters {
  uint32_t group[kCounters], row[kCounters], head[kCounters];
};

// Four flags a counter, packed so that the order in memory (little-endian) is that of the columns.
// A loop over plain arrays, so that it vectorises.
BLIP2FAST_CLONES void keep_flags(PhiloxKey key, const Counters& counters, int64_t count,
                                 uint32_t threshold, uint32_t* flags) {
  for (int64_t i = 0; i < count; ++i) {
    const PhiloxWords words =
        philox_words(key, counters.group[i], counters.row[i], counters.head[i]);
    flags[i] = static_cast<uint32_t>(words.word[0] >= threshold) |
               static_cast<uint32_t>(words.word[1] >= threshold) << 8 |
               static_cast<uint32_t>(words.word[2] >= threshold) << 16 |
               static_cast<uint32_t>(words.word[3] >= threshold) << 24;
  }
}

}  // namespace

void philox_keep_rows(const PhiloxKey& key, const int64_t* rows, const int64_t* heads,
                      int64_t count, int64_t columns, int64_t first_column, uint32_t threshold,
                      bool* keep) {
  Counters counters;
  uint32_t flags[kCounters];
  const int64_t first_group = first_column / 4, skipped = first_column % 4;
  const int64_t groups = (first_column + columns + 3) / 4 - first_group;
  // a tile is part of one long row, or several short rows
  const int64_t tile_groups = std::min(groups, kCounters);
  const int64_t tile_rows = std::max<int64_t>(kCounters / std::max<int64_t>(groups, 1), 1);
  for (int64_t row = 0; row < count; row += tile_rows) {
    const int64_t end_row = std::min(row + tile_rows, count);
    for (int64_t group = 0; group < groups; group += tile_groups) {
      const int64_t taken = std::min(tile_groups, groups - group);
      int64_t filled = 0;
      for (int64_t r = row; r < end_row; ++r) {
        for (int64_t g = 0; g < taken; ++g, ++filled) {
          counters.group[filled] = static_cast<uint32_t>(first_group + group + g);
          counters.row[filled] = static_cast<uint32_t>(rows[r]);
          counters.head[filled] = static_cast<uint32_t>(heads[r]);
        }
      }
      keep_flags(key, counters, filled, threshold, flags);
      // columns of the row that this tile covers
      const int64_t from = std::max<int64_t>(4 * group - skipped, 0);
      const int64_t to = std::min(4 * (group + taken) - skipped, columns);
      const int64_t lead = from + skipped - 4 * group;
      const auto* bytes = reinterpret_cast<const unsigned char*>(flags);
      for (int64_t r = row; r < end_row; ++r) {
        std::memcpy(keep + r * columns + from, bytes + 4 * taken * (r - row) + lead, to - from);
      }
    }
  }
}

}  // namespace blip2fast
