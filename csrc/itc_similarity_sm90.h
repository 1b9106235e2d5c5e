#pragma once

#include "itc_similarity.h"
#include "warpgroup.h"

namespace blip2fast {

// itc_similarity_kernel with wgmma. A block keeps the 256 queries of 8 images in shared memory;
// each of its two warpgroups passes its own half of every tile of 128 texts by them, and has their
// 64 x 256 products in registers. The warpgroups take turns: one multiplies while the other looks
// for the greatest values.
//
// Texts come by cp.async and not by TMA: rows of any stride, no tensor map from the driver's
// library, and copies that can be replayed on the host.
constexpr int kGroupTexts = 64;
constexpr int kGroupStage = kGroupTexts * kSlice * 2;
constexpr int kGroupStages = 6;
constexpr int kAhead = kGroupStages - 2;  // slices asked for before they are needed
constexpr int kGroups = 2;
constexpr int kHopperShared = 227 * 1024;

// barriers of the block
constexpr int kOwnBarrier = 1;   // and 2: of a warpgroup
constexpr int kTurnBarrier = 3;  // and 4: a warpgroup may multiply

inline int similarity_sm90_shared(int dim) {
  return (dim + kSlice - 1) / kSlice * kImageSlice + kGroups * kGroupStages * kGroupStage;
}
static_assert(kItcWidth / kSlice * kImageSlice + kGroups * kGroupStages * kGroupStage <=
              kHopperShared);

// Of two candidates the lanes with bit `mask` set keep the second, the others the first, each with
// the other lane's candidate for the same.
BLIP2FAST_DEVICE Best exchange_best(Best first, Best second, int mask) {
  const bool upper = (thread_index() & mask) != 0;
  const Best mine = upper ? second : first, gift = upper ? first : second;
  return better(mine, {shuffle_xor(gift.value, mask), shuffle_xor(gift.query, mask)});
}

// Greatest product of each of 8 images with rows g and g + 8 of the warp, over the quad. best[j] of
// lane t: row g + 8 (j / 2), image 4 (j % 2) + t.
BLIP2FAST_DEVICE void best_of_images(const float (&c)[128], Best (&best)[4]) {
  const int t = thread_index() % 4;
  Best lane_best[2 * kImageTile];
  BLIP2FAST_UNROLL
  for (int i = 0; i < 2 * kImageTile; ++i) {
    const int half = i / kImageTile, image = i % kImageTile;
    Best one = {c[16 * image + 2 * half], 0};
    BLIP2FAST_UNROLL
    for (int column = 1; column < 8; ++column) {
      const int n = column / 2, e = column % 2;
      const float value = c[16 * image + 4 * n + 2 * half + e];
      if (exceeds(value, one.value)) one = {value, 8 * n + e};
    }
    lane_best[i] = {one.value, one.query + 2 * t};
  }
  BLIP2FAST_UNROLL
  for (int j = 0; j < 4; ++j) {
    best[j] = exchange_best(exchange_best(lane_best[4 * j], lane_best[4 * j + 1], 1),
                            exchange_best(lane_best[4 * j + 2], lane_best[4 * j + 3], 1), 2);
  }
}

template <typename Format>
BLIP2FAST_KERNEL(kGroups* kWarpgroup, 1)
itc_similarity_sm90_kernel(const SimilarityParams params) {
  const ItcSweep& p = params.p;
  const SimilarityGrid& grid = params.grid;
  const int thread = thread_index(), group = thread / kWarpgroup, member = thread % kWarpgroup;
  const int64_t first_image = p.begin + block_index() / grid.splits * kImageTile;
  const int64_t first_tile = block_index() % grid.splits * grid.tiles_per_split;
  const int64_t tiles = first_tile + grid.tiles_per_split < grid.tiles ? grid.tiles_per_split
                                                                       : grid.tiles - first_tile;
  const int slices = (p.dim + kSlice - 1) / kSlice;
  char* const image_memory = shared_memory();
  char* const stages = image_memory + slices * kImageSlice + group * kGroupStages * kGroupStage;

  for (int i = thread; i < slices * kColumns * 8; i += kGroups * kWarpgroup) {
    const int piece = i % 8, column = i / 8 % kColumns, slice = i / (8 * kColumns);
    const int64_t image = first_image + column / kItcQueries;
    // copies of query 0 in place of queries that are not there: they never win
    const int query = column % kItcQueries < p.queries ? column % kItcQueries : 0;
    const int d = slice * kSlice + 8 * piece;
    const bool valid = image < p.end && d < p.dim;
    const uint16_t* from = p.image + image * p.image_row + query * p.image_query + d;
    copy16_async(image_memory + slice * kImageSlice + swizzled(column, piece),
                 valid ? from : p.image, valid);
  }
  copy_commit();
  const int64_t first_text = first_tile * kTextTile + group * kGroupTexts;
  // what is asked for next, kAhead slices before it is needed
  int64_t next_text = first_text + member / 8;
  int next_slice = 0, next_stage = 0;
  const auto fetch = [&] {
    if (next_text < (first_tile + tiles) * kTextTile) {
      char* const stage = stages + next_stage * kGroupStage;
      const int piece = member % 8, d = next_slice * kSlice + 8 * piece;
      const uint16_t* from = p.text + next_text * p.text_row + d;
      BLIP2FAST_UNROLL
      for (int row = 0; row < kGroupTexts; row += kWarpgroup / 8) {
        const bool valid = next_text + row < p.texts && d < p.dim;
        copy16_async(stage + swizzled(row + member / 8, piece),
                     valid ? from + row * p.text_row : p.text, valid);
      }
    }
    copy_commit();  // groups are counted, empty ones too
    if (++next_stage == kGroupStages) next_stage = 0;
    if (++next_slice == slices) {
      next_slice = 0;
      next_text += kTextTile;
    }
  };
  for (int i = 0; i < kAhead; ++i) fetch();
  copy_wait<kAhead>();
  publish_copies();
  block_barrier();  // the images are there
  if (group == 1) barrier_arrive(kTurnBarrier, kGroups * kWarpgroup);

  float c[128] = {};
  int stage = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    barrier_wait(kTurnBarrier + group, kGroups * kWarpgroup);
    for (int slice = 0; slice < slices; ++slice) {
      copy_wait<kAhead - 1>();
      publish_copies();
      // the slice is there, and the products with the slice before the last are done
      barrier_wait(kOwnBarrier + group, kWarpgroup);
      fetch();
      const uint64_t a = matrix_descriptor(stages + stage * kGroupStage);
      const uint64_t b = matrix_descriptor(image_memory + slice * kImageSlice);
      begin_products();
      BLIP2FAST_UNROLL
      for (int k = 0; k < kSlice / 16; ++k)
        multiply_async<Format>(c, a + 2 * k, b + 2 * k, slice + k > 0);
      commit_products();
      wait_products<1>();
      if (++stage == kGroupStages) stage = 0;
    }
    // the other's turn, unless it was its last
    if (group == 0 || tile + 1 < tiles)
      barrier_arrive(kTurnBarrier + 1 - group, kGroups * kWarpgroup);
    finish_products(c);

    Best best[4];
    best_of_images(c, best);
    BLIP2FAST_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int64_t image = first_image + 4 * (j % 2) + thread % 4;
      const int64_t text =
          first_text + tile * kTextTile + member / 32 * 16 + 8 * (j / 2) + thread % 32 / 4;
      if (image >= p.end || text >= p.texts) continue;
      const int64_t at = (image - p.begin) * p.texts + text;
      p.sim[at] = best[j].value;
      p.arg[at] = static_cast<uint8_t>(best[j].query < p.queries ? best[j].query : 0);
    }
  }
}

}  // namespace blip2fast
