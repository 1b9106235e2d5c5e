#pragma once

#include "device.h"
#include "itc.h"
#include "itc_pairs.h"
#include "philox.h"

namespace blip2fast {

constexpr int kStatisticsThreads = 128;
constexpr uint32_t kNoiseTag = 0x49544300;  // kernels/itc/noise.py
constexpr int kNowhere = 0x7FFFFFFF;
// similarities are loaded this many steps at a time, so that their latencies overlap
constexpr int kLoads = 4;

// A word as a draw from the standard Gumbel distribution.
BLIP2FAST_DEVICE float gumbel(uint32_t word) {
  const float u = fminf((static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f,
                        1.0f - 5.9604644775390625e-8f);
  return -logf(-log1pf(-u));
}

// What is kept of a row or column, or of a part of one; indices are below 2^31.
struct Statistics {
  float best = -kInfinity, exponentials = 0.0f, sum = 0.0f;  // exponentials: sum of exp(x - best)
  float positive_sum = 0.0f, positive_count = 0.0f, key = -kInfinity;
  int best_at = kNowhere, key_at = kNowhere;

  BLIP2FAST_DEVICE void add(float x, bool positive, float noise, int at) {
    if (exceeds(x, best)) {
      exponentials = exponentials * expf(best - x) + 1.0f;
      best = x;
      best_at = at;
    } else {
      exponentials += expf(x - best);
    }
    sum += x;
    if (positive) {
      positive_sum += x;
      positive_count += 1.0f;
    } else if (noise > -kInfinity && exceeds(x + noise, key)) {
      key = x + noise;
      key_at = at;
    }
  }
  // Parts in any order: the lowest index wins a tie.
  BLIP2FAST_DEVICE void join(const Statistics& other) {
    const float greatest = exceeds(other.best, best) ? other.best : best;
    if (exceeds(greatest, -kInfinity)) {
      exponentials =
          exponentials * expf(best - greatest) + other.exponentials * expf(other.best - greatest);
    }
    if (wins(other.best, other.best_at, best, best_at)) best_at = other.best_at;
    best = greatest;
    sum += other.sum;
    positive_sum += other.positive_sum;
    positive_count += other.positive_count;
    if (wins(other.key, other.key_at, key, key_at)) {
      key = other.key;
      key_at = other.key_at;
    }
  }
  BLIP2FAST_DEVICE float lse() const {
    return best + logf(exponentials);
  }
  // With `at` counted from `first`.
  BLIP2FAST_DEVICE void store(float* values, int64_t* index, int64_t stride, int64_t i,
                              int64_t first) const {
    const float all[kItcStatistics] = {lse(), sum, positive_sum, positive_count, best, key};
    BLIP2FAST_UNROLL
    for (int s = 0; s < kItcStatistics; ++s) values[s * stride + i] = all[s];
    index[i] = best_at == kNowhere ? -1 : first + best_at;
    // not above -inf: all are positives, or not a number
    index[stride + i] = key > -kInfinity ? first + key_at : -1;
  }
};

// Noise of the pairs (image, text) and (image, text + 1), text even: of rows, or of columns.
struct Noise {
  float of[2];
};
BLIP2FAST_DEVICE Noise pair_noise(const ItcSweep& p, PhiloxKey philox, int64_t image, int64_t text,
                                  bool of_column) {
  const PhiloxWords words = philox_words(philox, static_cast<uint32_t>(text / 2),
                                         static_cast<uint32_t>(p.first_row + image), kNoiseTag);
  return {{gumbel(words.word[of_column ? 2 : 0]), gumbel(words.word[of_column ? 3 : 1])}};
}

// Similarities with texts `text` and `text + 1`; zeros beyond the last.
BLIP2FAST_DEVICE void load_pair(const float* sim, int64_t text, int64_t texts, float (&pair)[2]) {
  BLIP2FAST_UNROLL
  for (int e = 0; e < 2; ++e) pair[e] = text + e < texts ? sim[text + e] : 0.0f;
}

// One warp a row; a lane takes two neighbouring texts at a time.
static BLIP2FAST_KERNEL(kStatisticsThreads, 4) itc_rows_kernel(const ItcSweep p) {
  const int lane = thread_index() % 32;
  const int64_t image = p.begin + block_index() * (kStatisticsThreads / 32) + thread_index() / 32;
  if (image >= p.end) return;
  const float* sim = p.sim + (image - p.begin) * p.texts;
  const PhiloxKey philox = p.philox == nullptr ? PhiloxKey{} : philox_key(p.philox);
  const float temp = *p.temp;
  Statistics statistics;
  for (int64_t begin = 2 * lane; begin < p.texts; begin += 64 * kLoads) {
    float values[kLoads][2];
    BLIP2FAST_UNROLL
    for (int i = 0; i < kLoads; ++i) load_pair(sim, begin + 64 * i, p.texts, values[i]);
    BLIP2FAST_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int64_t text = begin + 64 * i;
      if (text >= p.texts) break;
      Noise noise = {{-kInfinity, -kInfinity}};
      if (p.philox != nullptr) noise = pair_noise(p, philox, image, text, false);
      BLIP2FAST_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (text + e < p.texts)
          statistics.add(values[i][e] / temp, is_positive(p, image, text + e), noise.of[e],
                         static_cast<int>(text + e));
      }
    }
  }
  BLIP2FAST_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) {
    Statistics other;
    other.best = shuffle_xor(statistics.best, mask);
    other.exponentials = shuffle_xor(statistics.exponentials, mask);
    other.sum = shuffle_xor(statistics.sum, mask);
    other.positive_sum = shuffle_xor(statistics.positive_sum, mask);
    other.positive_count = shuffle_xor(statistics.positive_count, mask);
    other.key = shuffle_xor(statistics.key, mask);
    other.best_at = shuffle_xor(statistics.best_at, mask);
    other.key_at = shuffle_xor(statistics.key_at, mask);
    statistics.join(other);
  }
  if (lane == 0) statistics.store(p.rows, p.row_index, p.images, image, 0);
}

// One thread: two neighbouring columns over one segment of the chunk's rows.
static BLIP2FAST_KERNEL(kStatisticsThreads, 4) itc_columns_kernel(const ItcSweep p) {
  const int64_t pairs = (p.texts + 1) / 2;
  const int64_t across = (pairs + kStatisticsThreads - 1) / kStatisticsThreads;
  const int64_t text = 2 * (block_index() % across * kStatisticsThreads + thread_index());
  const int64_t segment = p.begin / p.segment_rows + block_index() / across;
  if (text >= p.texts) return;
  const int64_t first = segment * p.segment_rows;
  const int64_t last = first + p.segment_rows < p.end ? first + p.segment_rows : p.end;
  const PhiloxKey philox = p.philox == nullptr ? PhiloxKey{} : philox_key(p.philox);
  const float temp = *p.temp;
  Statistics statistics[2];
  for (int64_t begin = first; begin < last; begin += kLoads) {
    const float* sim = p.sim + (begin - p.begin) * p.texts;
    float values[kLoads][2];
    BLIP2FAST_UNROLL
    for (int i = 0; i < kLoads; ++i)
      load_pair(sim + i * p.texts, text, begin + i < last ? p.texts : 0, values[i]);
    BLIP2FAST_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int64_t image = begin + i;
      if (image >= last) break;
      Noise noise = {{-kInfinity, -kInfinity}};
      if (p.philox != nullptr) noise = pair_noise(p, philox, image, text, true);
      BLIP2FAST_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (text + e < p.texts)
          statistics[e].add(values[i][e] / temp, is_positive(p, image, text + e), noise.of[e],
                            static_cast<int>(image));
      }
    }
  }
  BLIP2FAST_UNROLL
  for (int e = 0; e < 2; ++e) {
    if (text + e >= p.texts) continue;
    const float all[kItcStatistics] = {statistics[e].exponentials, statistics[e].sum,
                                       statistics[e].positive_sum, statistics[e].positive_count,
                                       statistics[e].best,         statistics[e].key};
    float* values = p.parts + segment * kItcStatistics * p.texts + text + e;
    BLIP2FAST_UNROLL
    for (int s = 0; s < kItcStatistics; ++s) values[s * p.texts] = all[s];
    int32_t* index = p.part_index + segment * 2 * p.texts + text + e;
    index[0] = statistics[e].best_at;
    index[p.texts] = statistics[e].key_at;
  }
}

// One thread a column: its segments, in order.
static BLIP2FAST_KERNEL(kStatisticsThreads, 4) itc_join_columns_kernel(const ItcSweep p) {
  const int64_t text = block_index() * kStatisticsThreads + thread_index();
  if (text >= p.texts) return;
  const int64_t segments = (p.images + p.segment_rows - 1) / p.segment_rows;
  Statistics statistics;
  for (int64_t begin = 0; begin < segments; begin += kLoads) {
    Statistics parts[kLoads];
    BLIP2FAST_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int64_t segment = begin + i;
      if (segment >= segments) break;
      const float* values = p.parts + segment * kItcStatistics * p.texts + text;
      const int32_t* index = p.part_index + segment * 2 * p.texts + text;
      parts[i].exponentials = values[0];
      parts[i].sum = values[p.texts];
      parts[i].positive_sum = values[2 * p.texts];
      parts[i].positive_count = values[3 * p.texts];
      parts[i].best = values[4 * p.texts];
      parts[i].key = values[5 * p.texts];
      parts[i].best_at = index[0];
      parts[i].key_at = index[p.texts];
    }
    BLIP2FAST_UNROLL
    for (int i = 0; i < kLoads; ++i) statistics.join(parts[i]);
  }
  statistics.store(p.columns, p.column_index, p.texts, text, p.first_row);
}

}  // namespace blip2fast
