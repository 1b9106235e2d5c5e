#pragma once

#include "itc_pairs.h"
#include "itc_statistics.h"

namespace blip2fast {

// Byte of 16-byte piece `piece` (0 to 31) of a 512-byte row.
BLIP2FAST_DEVICE int swizzled_wide(int row, int piece) {
  return row * kItcWidth * 2 + ((piece ^ (row & 7)) << 4);
}

template <typename Format, bool OF_IMAGE>
BLIP2FAST_KERNEL(kGradientThreads, 1)
itc_gradient_kernel(const ItcSweep p) {
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const float temp = *p.temp, factor = p.scale[0] / temp;
  const GradientShare own = gradient_share<OF_IMAGE>(p);
  char* const stages = shared_memory();
  auto* const pairs = reinterpret_cast<uint32_t*>(stages + kGradientStages * kGradientStage);

  const auto fetch = [&](int64_t step) {
    char* const stage = stages + step % kGradientStages * kGradientStage;
    fetch_terms<OF_IMAGE>(p, own, step,
                          [&](int row, int piece) { return stage + swizzled_wide(row, piece); });
  };
  StepPairs<Format, OF_IMAGE> mine;

  // a warp: 64 rows, 64 columns
  const int warp_row = warp / 4 * 64, warp_column = warp % 4 * 64;
  float c[4][8][4] = {};
  fetch(0);
  fetch(1);
  mine.ask(p, own, 0);
  mine.answer(p, own, 0, temp, factor, pairs);
  for (int64_t step = 0; step < own.steps; ++step) {
    copy_wait<1>();
    block_barrier();  // the stage and the pairs are there; the stage before is free
    fetch(step + 2);
    mine.ask(p, own, step + 1);
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
          a[m][part] = one_hot<OF_IMAGE>(now, warp_row + 16 * m + part % 2 * 8 + g,
                                         16 * k + part / 2 * 8 + 2 * t);
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
    mine.answer(p, own, step + 1, temp, factor, pairs);
  }

  BLIP2FAST_UNROLL
  for (int m = 0; m < 4; ++m) {
    BLIP2FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + 16 * m + 8 * half + g;
      BLIP2FAST_UNROLL
      for (int n = 0; n < 8; ++n) {
        store_gradient<Format, OF_IMAGE>(p, own, row, warp_column + 8 * n + 2 * t,
                                         c[m][n][2 * half], c[m][n][2 * half + 1], p.scale[1]);
      }
    }
  }
  if (OF_IMAGE) store_temp_part(p, mine.total, reinterpret_cast<float*>(pairs));
}

// Gradients of pairs are about 1 / N^2 and vanish in fp16; times a power of two that takes the
// largest that there may be to 2^12 .. 2^15 they keep their bits. One block looks at all weights.
constexpr int kScaleThreads = 512;
static BLIP2FAST_KERNEL(kScaleThreads, 1) itc_scale_kernel(const ItcSweep p) {
  const int thread = thread_index();
  float most = 0.0f;
  for (int64_t i = thread; i < 3 * p.images; i += kScaleThreads)
    most = fmaxf(most, fabsf(p.row_weight[i]));
  for (int64_t i = thread; i < 3 * p.texts; i += kScaleThreads)
    most = fmaxf(most, fabsf(p.column_weight[i]));
  BLIP2FAST_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) most = fmaxf(most, shuffle_xor(most, mask));
  auto* const warps = reinterpret_cast<float*>(shared_memory());
  if (thread % 32 == 0) warps[thread / 32] = most;
  block_barrier();
  if (thread > 0) return;
  for (int i = 1; i < kScaleThreads / 32; ++i) most = fmaxf(most, warps[i]);
  most /= fabsf(*p.temp);
  int exponent = 0;
  // a pair has up to six weights' worth, three of its row and three of its column
  if (most > 0.0f && most < kInfinity) exponent = 11 - ilogbf(most);
  exponent = exponent > 100 ? 100 : exponent < -100 ? -100 : exponent;
  p.scale[0] = ldexpf(1.0f, exponent);
  p.scale[1] = ldexpf(1.0f, -exponent);
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
