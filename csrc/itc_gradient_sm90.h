#pragma once

#include "itc_pairs.h"
#include "itc_similarity_sm90.h"

namespace blip2fast {

// itc_gradient_kernel with wgmma: each of two warpgroups has 64 rows of the block's gradient and
// all 256 features. Its one-hot operand goes from registers to the tensor cores, the rows of
// features, inner index first, from shared memory: 32 rows of 64 features after another.
constexpr int kTermSlice = 32 * kSwizzleRow;
static_assert(kItcWidth / kSlice * kTermSlice == kGradientStage);
static_assert(kGradientThreads == kGroups * kWarpgroup);

template <typename Format, bool OF_IMAGE>
BLIP2FAST_KERNEL(kGradientThreads, 1)
itc_gradient_sm90_kernel(const ItcSweep p) {
  const int warp = thread_index() / 32, lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const float temp = *p.temp, factor = p.scale[0] / temp;
  const GradientShare own = gradient_share<OF_IMAGE>(p);
  char* const stages = shared_memory();
  auto* const pairs = reinterpret_cast<uint32_t*>(stages + kGradientStages * kGradientStage);
  const auto fetch = [&](int64_t step) {
    char* const stage = stages + step % kGradientStages * kGradientStage;
    fetch_terms<OF_IMAGE>(p, own, step, [&](int row, int piece) {
      return stage + piece / 8 * kTermSlice + swizzled(row, piece % 8);
    });
  };
  StepPairs<Format, OF_IMAGE> mine;

  const int warp_row = 16 * warp;
  float c[128] = {};
  fetch(0);
  fetch(1);
  mine.ask(p, own, 0);
  mine.answer(p, own, 0, temp, factor, pairs);
  for (int64_t step = 0; step < own.steps; ++step) {
    copy_wait<1>();
    publish_copies();
    block_barrier();  // the stage and the pairs are there; the stage before is free
    mine.ask(p, own, step + 1);
    const char* const stage = stages + step % kGradientStages * kGradientStage;
    const uint32_t* const now = pairs + step % 2 * kGradientRows;
    uint32_t a[2][4];
    BLIP2FAST_UNROLL
    for (int k = 0; k < 2; ++k) {
      BLIP2FAST_UNROLL
      for (int part = 0; part < 4; ++part)
        a[k][part] =
            one_hot<OF_IMAGE>(now, warp_row + part % 2 * 8 + g, 16 * k + part / 2 * 8 + 2 * t);
    }
    begin_products();
    BLIP2FAST_UNROLL
    for (int k = 0; k < 2; ++k)
      multiply_registers_async<Format>(
          c, a[k], transposed_descriptor(stage + 16 * k * kSwizzleRow, kTermSlice));
    commit_products();
    // what comes next, while the products are computed
    fetch(step + 2);
    mine.answer(p, own, step + 1, temp, factor, pairs);
    wait_products<0>();
  }
  finish_products(c);

  BLIP2FAST_UNROLL
  for (int i = 0; i < 64; ++i) {
    const int n = i / 2, half = i % 2;
    store_gradient<Format, OF_IMAGE>(p, own, warp_row + 8 * half + g, 8 * n + 2 * t,
                                     c[4 * n + 2 * half], c[4 * n + 2 * half + 1], p.scale[1]);
  }
  if (OF_IMAGE) store_temp_part(p, mine.total, reinterpret_cast<float*>(pairs));
}

}  // namespace blip2fast
