// Pairs of an image and a text, and what both kernels of their gradients share.
#pragma once

#include "device.h"
#include "itc.h"

namespace blip2fast {

BLIP2FAST_DEVICE bool is_positive(const ItcSweep& p, int64_t image, int64_t text) {
  return p.row_ids == nullptr ? p.first_row + image == text
                              : p.row_ids[image] == p.column_ids[text];
}

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
  // The gradient that goes to this side, times `factor`, in the low 16 bits; the query in the high
  // ones. `total` gains both sides' gradient times x.
  template <typename Format>
  BLIP2FAST_DEVICE uint32_t finish(const ItcSweep& p, float temp, float factor, float& total) {
    if (!exists) return 0xFFFF0000u;  // no such query: adds nothing
    x /= temp;
    const float of_row =
        row_weight[0] * expf(x - row_lse) + row_weight[1] + (positive ? row_weight[2] : 0.0f);
    const float of_column = column_weight[0] * expf(x - column_lse) + column_weight[1] +
                            (positive ? column_weight[2] : 0.0f);
    const float both = of_row + of_column;
    total += both * x;
    const float mine = p.local ? (OF_IMAGE ? of_row : of_column) : both;
    return (pack<Format>(mine * factor, 0.0f) & 0xFFFFu) | static_cast<uint32_t>(arg) << 16;
  }
};

inline int64_t image_gradient_blocks(const ItcSweep& p) {
  constexpr int kOwned = kGradientRows / kItcQueries;
  return (p.end - p.begin + kOwned - 1) / kOwned;
}
inline int64_t text_gradient_blocks(const ItcSweep& p) {
  return (p.texts + kGradientRows - 1) / kGradientRows * p.text_splits;
}

// What a block owns, and the terms it adds up.
struct GradientShare {
  int64_t first_image, first_text, steps, split;
};
template <bool OF_IMAGE>
BLIP2FAST_DEVICE GradientShare gradient_share(const ItcSweep& p) {
  if (OF_IMAGE)
    return {p.begin + block_index() * (kGradientRows / kItcQueries), 0, (p.texts + 31) / 32, 0};
  GradientShare own;
  own.split = block_index() % p.text_splits;
  own.first_text = block_index() / p.text_splits * kGradientRows;
  const int64_t share = (p.end - p.begin + p.text_splits - 1) / p.text_splits;
  own.first_image = p.begin + own.split * share;
  const int64_t left = p.end - own.first_image;
  own.steps = left < share ? (left > 0 ? left : 0) : share;
  return own;
}

// Features d and d + 1 of a row of the block's gradient, from what the products added up.
template <typename Format, bool OF_IMAGE>
BLIP2FAST_DEVICE void store_gradient(const ItcSweep& p, const GradientShare& own, int row, int d,
                                     float low, float high, float unscale) {
  if (d >= p.dim) return;
  low *= unscale;
  high *= unscale;
  if (OF_IMAGE) {
    const int64_t image = own.first_image + row / kItcQueries;
    const int query = row % kItcQueries;
    if (image >= p.end || query >= p.queries) return;
    uint16_t* to = p.d_image + (image * p.queries + query) * p.dim + d;
    *reinterpret_cast<uint32_t*>(to) = pack<Format>(low, high);
  } else {
    const int64_t text = own.first_text + row;
    if (text >= p.texts) return;
    float* to = p.d_text_parts + (own.split * p.texts + text) * p.dim + d;
    // chunks of images follow each other, each adds to what the last one left
    to[0] = p.begin > 0 ? to[0] + low : low;
    to[1] = p.begin > 0 ? to[1] + high : high;
  }
}

// The sum of `total` over the first 128 threads, by way of `memory` that nobody reads any more.
BLIP2FAST_DEVICE void store_temp_part(const ItcSweep& p, float total, float* memory) {
  const int thread = thread_index();
  BLIP2FAST_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  block_barrier();  // the last products have read the pairs
  if (thread % 32 == 0) memory[thread / 32] = total;
  block_barrier();
  if (thread == 0) {
    float sum = 0.0f;
    for (int i = 0; i < kGradientRows / 32; ++i) sum += memory[i];
    p.d_temp_parts[p.begin / (kGradientRows / kItcQueries) + block_index()] = sum;
  }
}

// Ask for the 32 rows of features that a step multiplies with; place(row, piece) is where 16 bytes
// go.
template <bool OF_IMAGE, typename Place>
BLIP2FAST_DEVICE void fetch_terms(const ItcSweep& p, const GradientShare& own, int64_t step,
                                  const Place& place) {
  if (step < own.steps) {
    for (int i = thread_index(); i < 32 * 32; i += kGradientThreads) {
      const int piece = i % 32, row = i / 32;
      bool valid = 8 * piece < p.dim;
      const uint16_t* from = nullptr;
      if (OF_IMAGE) {
        const int64_t text = step * 32 + row;
        valid = valid && text < p.texts;
        from = p.text + text * p.text_row + 8 * piece;
      } else {
        valid = valid && row < p.queries;
        from = p.image + (own.first_image + step) * p.image_row + row * p.image_query + 8 * piece;
      }
      copy16_async(place(row, piece), valid ? from : p.text, valid);
    }
  }
  copy_commit();  // groups are counted, empty ones too
}

// One pair of a step for each of the first 128 threads; its gradient goes to `pairs`.
template <typename Format, bool OF_IMAGE>
struct StepPairs {
  PairGradient<OF_IMAGE> pair = {};
  float total = 0.0f;

  BLIP2FAST_DEVICE void ask(const ItcSweep& p, const GradientShare& own, int64_t step) {
    const int thread = thread_index();
    if (step >= own.steps || thread >= kGradientRows) return;
    if (OF_IMAGE)
      pair.load(p, own.first_image + thread / 32, step * 32 + thread % 32);
    else
      pair.load(p, own.first_image + step, own.first_text + thread);
  }
  BLIP2FAST_DEVICE void answer(const ItcSweep& p, const GradientShare& own, int64_t step,
                               float temp, float factor, uint32_t* pairs) {
    const int thread = thread_index();
    if (step < own.steps && thread < kGradientRows)
      pairs[step % 2 * kGradientRows + thread] =
          pair.template finish<Format>(p, temp, factor, total);
  }
};

// Elements `term` and `term + 1` of a row of the one-hot operand, from the pairs of the step.
template <bool OF_IMAGE>
BLIP2FAST_DEVICE uint32_t one_hot(const uint32_t* pairs, int row, int term) {
  if (OF_IMAGE) {
    const uint32_t* const two = pairs + row / kItcQueries * 32 + term;
    const uint32_t query = row % kItcQueries;
    return (two[0] >> 16 == query ? two[0] & 0xFFFFu : 0u) |
           (two[1] >> 16 == query ? two[1] << 16 : 0u);
  }
  const uint32_t one = pairs[row], query = one >> 16;
  return query == static_cast<uint32_t>(term)       ? one & 0xFFFFu
         : query == static_cast<uint32_t>(term + 1) ? one << 16
                                                    : 0u;
}

}  // namespace blip2fast
