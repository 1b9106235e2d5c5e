#pragma once

#include "itc_similarity.h"
#include "itc_statistics.h"

namespace blip2fast {

// d_image = W text and d_text = W' image, where W[(image, query), text] is the pair's gradient
// where the query is the best one, else 0: dense products whose left operand is made in registers.
//
// A block owns 128 rows of the result: the queries of 4 images (OF_IMAGE), or 128 texts. A step
// adds 32 terms: 32 texts, or the queries of one image. Either way it is 128 pairs, one for each of
// the first 128 threads.
constexpr int kGradientThreads = 256;
constexpr int kGradientRows = 128;
constexpr int kGradientStage = 32 * kItcWidth * 2;
constexpr int kGradientStages = 3;
constexpr int kGradientShared = kGradientStages * kGradientStage + 2 * kGradientRows * 4;

// Byte of 16-byte piece `piece` (0 to 31) of a 512-byte row.
BLIP2FAST_DEVICE int swizzled_wide(int row, int piece) {
  return row * kItcWidth * 2 + ((piece ^ (row & 7)) << 4);
}

template <bool OF_IMAGE>
struct PairGradient {
  // asked for before the products of a step, used after them
  float x, row_lse, row_weight[3], column_lse, column_weight[3];
  int arg;
  bool exists, positive;

  BLIP2FAST_DEVICE void load(const ItcSweep& p, int64_t image, int64_t text) {
    exists = image < p.end && text < p.texts;
    if (!exists) return;
    const int64_t at = (image - p.begin) * p.texts + text;
    x = p.sim[at];
    arg = p.arg[at];
    positive = is_positive(p, image, text);
    row_lse = p.row_lse[image];
    column_lse = p.column_lse[text];
    BLIP2FAST_UNROLL
    for (int i = 0; i < 3; ++i) {
      row_weight[i] = p.row_weight[i * p.images + image];
      column_weight[i] = p.column_weight[i * p.texts + text];
    }
  }
  // The gradient that goes to this side, over the temperature, in the low 16 bits; the query in the
  // high ones. `total` gains both sides' gradient times x.
  template <typename Format>
  BLIP2FAST_DEVICE uint32_t finish(const ItcSweep& p, float temp, float& total) {
    if (!exists) return 0xFFFF0000u;  // no such query: adds nothing
    x /= temp;
    const float of_row =
        row_weight[0] * expf(x - row_lse) + row_weight[1] + (positive ? row_weight[2] : 0.0f);
    const float of_column = column_weight[0] * expf(x - column_lse) + column_weight[1] +
                            (positive ? column_weight[2] : 0.0f);
    const float both = of_row + of_column;
    total += both * x;
    const float mine = p.local ? (OF_IMAGE ? of_row : of_column) : both;
    return (pack<Format>(mine / temp, 0.0f) & 0xFFFFu) | static_cast<uint32_t>(arg) << 16;
  }
};

template <typename Format, bool OF_IMAGE>
BLIP2FAST_KERNEL(kGradientThreads, 1)
itc_gradient_kernel(const ItcSweep p) {
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const float temp = *p.temp;
  // what the block owns, and the terms it adds up
  int64_t first_image = p.begin, first_text = 0, steps, split = 0;
  if (OF_IMAGE) {
    first_image += block_index() * (kGradientRows / kItcQueries);
    steps = (p.texts + 31) / 32;
  } else {
    split = block_index() % p.text_splits;
    first_text = block_index() / p.text_splits * kGradientRows;
    const int64_t share = (p.end - p.begin + p.text_splits - 1) / p.text_splits;
    first_image += split * share;
    const int64_t left = p.end - first_image;
    steps = left < share ? (left > 0 ? left : 0) : share;
  }
  char* const stages = shared_memory();
  auto* const pairs = reinterpret_cast<uint32_t*>(stages + kGradientStages * kGradientStage);

  const auto fetch = [&](int64_t step) {
    if (step < steps) {
      char* const stage = stages + step % kGradientStages * kGradientStage;
      for (int i = thread; i < 32 * 32; i += kGradientThreads) {
        const int piece = i % 32, row = i / 32;
        bool valid = 8 * piece < p.dim;
        const uint16_t* from = nullptr;
        if (OF_IMAGE) {
          const int64_t text = step * 32 + row;
          valid = valid && text < p.texts;
          from = p.text + text * p.text_row + 8 * piece;
        } else {
          valid = valid && row < p.queries;
          from = p.image + (first_image + step) * p.image_row + row * p.image_query + 8 * piece;
        }
        copy16_async(stage + swizzled_wide(row, piece), valid ? from : p.text, valid);
      }
    }
    copy_commit();
  };
  PairGradient<OF_IMAGE> pair = {};
  float total = 0.0f;
  const auto ask = [&](int64_t step) {
    if (step >= steps || thread >= kGradientRows) return;
    if (OF_IMAGE)
      pair.load(p, first_image + thread / 32, step * 32 + thread % 32);
    else
      pair.load(p, first_image + step, first_text + thread);
  };
  const auto answer = [&](int64_t step) {
    if (step < steps && thread < kGradientRows)
      pairs[step % 2 * kGradientRows + thread] = pair.template finish<Format>(p, temp, total);
  };

  // a warp: 64 rows, 64 columns
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 64;
  float c[4][8][4] = {};
  fetch(0);
  fetch(1);
  ask(0);
  answer(0);
  for (int64_t step = 0; step < steps; ++step) {
    copy_wait<1>();
    block_barrier();  // the stage and the pairs are there; the stage before is free
    fetch(step + 2);
    ask(step + 1);
    const char* const stage = stages + step % kGradientStages * kGradientStage;
    const uint32_t* const now = pairs + step % 2 * kGradientRows;
    BLIP2FAST_UNROLL
    for (int k = 0; k < 2; ++k) {
      uint32_t a[4][4], b[4][4];
      BLIP2FAST_UNROLL
      for (int n = 0; n < 4; ++n)
        load_matrices_transposed(b[n], stage + swizzled_wide(16 * k + lane / 8 % 2 * 8 + lane % 8,
                                                             warp_column / 8 + 2 * n + lane / 16));
      BLIP2FAST_UNROLL
      for (int m = 0; m < 4; ++m) {
        BLIP2FAST_UNROLL
        for (int part = 0; part < 4; ++part) {
          const int row = warp_row + 16 * m + part % 2 * 8 + g,
                    term = 16 * k + part / 2 * 8 + 2 * t;
          if (OF_IMAGE) {
            const uint32_t* const two = now + row / kItcQueries * 32 + term;
            const uint32_t query = row % kItcQueries;
            a[m][part] = (two[0] >> 16 == query ? two[0] & 0xFFFFu : 0u) |
                         (two[1] >> 16 == query ? two[1] << 16 : 0u);
          } else {
            const uint32_t one = now[row], query = one >> 16;
            a[m][part] = query == static_cast<uint32_t>(term)       ? one & 0xFFFFu
                         : query == static_cast<uint32_t>(term + 1) ? one << 16
                                                                    : 0u;
          }
        }
      }
      BLIP2FAST_UNROLL
      for (int m = 0; m < 4; ++m) {
        BLIP2FAST_UNROLL
        for (int n = 0; n < 8; ++n) {
          const uint32_t right[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          mma<Format>(c[m][n], a[m], right);
        }
      }
    }
    answer(step + 1);
  }

  BLIP2FAST_UNROLL
  for (int m = 0; m < 4; ++m) {
    BLIP2FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * m + 8 * half + g;
      BLIP2FAST_UNROLL
      for (int n = 0; n < 8; ++n) {
        const int d = warp_column + 8 * n + 2 * t;
        if (d >= p.dim) continue;
        const float low = c[m][n][2 * half], high = c[m][n][2 * half + 1];
        if (OF_IMAGE) {
          const int64_t image = first_image + row / kItcQueries;
          const int query = row % kItcQueries;
          if (image >= p.end || query >= p.queries) continue;
          uint16_t* to = p.d_image + (image * p.queries + query) * p.dim + d;
          *reinterpret_cast<uint32_t*>(to) = pack<Format>(low, high);
        } else {
          const int64_t text = first_text + row;
          if (text >= p.texts) continue;
          float* to = p.d_text_parts + (split * p.texts + text) * p.dim + d;
          // chunks of images follow each other, each adds to what the last one left
          to[0] = p.begin > 0 ? to[0] + low : low;
          to[1] = p.begin > 0 ? to[1] + high : high;
        }
      }
    }
  }

  if (OF_IMAGE) {
    BLIP2FAST_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
    block_barrier();  // the last products have read the pairs
    auto* const totals = reinterpret_cast<float*>(pairs);
    if (lane == 0) totals[warp] = total;
    block_barrier();
    if (thread == 0) {
      float sum = 0.0f;
      for (int i = 0; i < kGradientRows / 32; ++i) sum += totals[i];
      p.d_temp_parts[p.begin / (kGradientRows / kItcQueries) + block_index()] = sum;
    }
  }
}

// d_text: one thread two features, the parts in order.
template <typename Format>
BLIP2FAST_KERNEL(kStatisticsThreads, 4)
itc_join_text_kernel(const ItcSweep p) {
  const int64_t at = 2 * (block_index() * kStatisticsThreads + thread_index());
  const int64_t size = p.texts * p.dim;
  if (at >= size) return;
  float low = 0.0f, high = 0.0f;
  for (int split = 0; split < p.text_splits; ++split) {
    low += p.d_text_parts[split * size + at];
    high += p.d_text_parts[split * size + at + 1];
  }
  *reinterpret_cast<uint32_t*>(p.d_text + at) = pack<Format>(low, high);
}

// d_temp: one warp, every lane a fixed share of the parts.
static BLIP2FAST_KERNEL(32, 1) itc_join_temp_kernel(const ItcSweep p) {
  const int64_t parts =
      (p.images + kGradientRows / kItcQueries - 1) / (kGradientRows / kItcQueries);
  float total = 0.0f;
  for (int64_t i = thread_index(); i < parts; i += 32) total += p.d_temp_parts[i];
  BLIP2FAST_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  if (thread_index() == 0) *p.d_temp = -total / *p.temp;
}

}  // namespace blip2fast
