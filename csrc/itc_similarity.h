#pragma once

#include "device.h"
#include "itc.h"

namespace blip2fast {

// A block: the 32 queries of 8 images stay in shared memory, tiles of 128 texts pass by. Queries
// are the columns of the product, so that an image's maximum is mostly within a lane.
constexpr int kSimilarityThreads = 256;
constexpr int kTextTile = 128;
constexpr int kImageTile = 8;
constexpr int kColumns = kImageTile * kItcQueries;
constexpr int kSlice = 64;  // of the feature width, 128 bytes a row
constexpr int kTextStage = kTextTile * kSlice * 2;
constexpr int kImageSlice = kColumns * kSlice * 2;

// Byte of 16-byte piece `piece` (0 to 7) of a 128-byte row; rows of eight lie in different banks.
BLIP2FAST_DEVICE int swizzled(int row, int piece) {
  return row * 128 + ((piece ^ (row & 7)) << 4);
}

struct SimilarityGrid {
  int64_t groups, tiles, splits, tiles_per_split;
};
inline SimilarityGrid similarity_grid(int64_t images, int64_t texts, int64_t multiprocessors) {
  SimilarityGrid grid;
  grid.groups = (images + kImageTile - 1) / kImageTile;
  grid.tiles = (texts + kTextTile - 1) / kTextTile;
  // to read its images costs a block about as much as a tile
  const int64_t splits = quickest_splits(grid.groups, grid.tiles, 1, grid.tiles, multiprocessors);
  grid.tiles_per_split = (grid.tiles + splits - 1) / splits;
  grid.splits = (grid.tiles + grid.tiles_per_split - 1) / grid.tiles_per_split;
  return grid;
}

struct Best {
  float value;
  int query;
};
BLIP2FAST_DEVICE Best better(Best a, Best b) {
  return wins(b.value, b.query, a.value, a.query) ? b : a;
}
BLIP2FAST_DEVICE Best quad_best(Best best) {
  BLIP2FAST_UNROLL
  for (int mask = 1; mask <= 2; mask *= 2)
    best = better(best, {shuffle_xor(best.value, mask), shuffle_xor(best.query, mask)});
  return best;
}

struct SimilarityParams {
  ItcSweep p;
  SimilarityGrid grid;
  int image_slices;  // in shared memory: all, or 2 that are read again for every tile of texts
};
inline int similarity_slices(int dim) {
  return (dim + kSlice - 1) / kSlice;
}
inline int similarity_shared(int image_slices) {
  return image_slices * kImageSlice + 2 * kTextStage;
}
static_assert(2 * kImageSlice + 2 * kTextStage <= 99 * 1024);  // sm_86, sm_89, sm_120

template <typename Format>
BLIP2FAST_KERNEL(kSimilarityThreads, 1)
itc_similarity_kernel(const SimilarityParams params) {
  const ItcSweep& p = params.p;
  const SimilarityGrid& grid = params.grid;
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t first_image = p.begin + block_index() / grid.splits * kImageTile;
  const int64_t first_tile = block_index() % grid.splits * grid.tiles_per_split;
  const int tiles =
      static_cast<int>(first_tile + grid.tiles_per_split < grid.tiles ? grid.tiles_per_split
                                                                      : grid.tiles - first_tile);
  const int slices = (p.dim + kSlice - 1) / kSlice, image_slices = params.image_slices;
  char* const image_memory = shared_memory();
  char* const text_memory = image_memory + image_slices * kImageSlice;

  const auto fetch_images = [&](int slice, char* to) {
    for (int i = thread; i < kColumns * 8; i += kSimilarityThreads) {
      const int piece = i % 8, column = i / 8;
      const int64_t image = first_image + column / kItcQueries;
      const int query = column % kItcQueries, d = slice * kSlice + 8 * piece;
      const bool valid = image < p.end && query < p.queries && d < p.dim;
      const uint16_t* from = p.image + image * p.image_row + query * p.image_query + d;
      copy16_async(to + swizzled(column, piece), valid ? from : p.image, valid);
    }
  };
  if (image_slices == slices) {
    for (int slice = 0; slice < slices; ++slice)
      fetch_images(slice, image_memory + slice * kImageSlice);
  }
  const int steps = tiles * slices;
  const auto fetch = [&](int step) {
    if (step < steps) {
      const int64_t first_text = (first_tile + step / slices) * kTextTile;
      const int slice = step % slices;
      if (image_slices < slices) fetch_images(slice, image_memory + step % 2 * kImageSlice);
      char* const stage = text_memory + step % 2 * kTextStage;
      for (int i = thread; i < kTextTile * 8; i += kSimilarityThreads) {
        const int piece = i % 8, row = i / 8, d = slice * kSlice + 8 * piece;
        const int64_t text = first_text + row;
        const bool valid = text < p.texts && d < p.dim;
        copy16_async(stage + swizzled(row, piece), valid ? p.text + text * p.text_row + d : p.text,
                     valid);
      }
    }
    copy_commit();  // groups are counted, empty ones too
  };
  fetch(0);
  fetch(1);

  // a warp: 64 texts, two images
  const int warp_text = warp / 4 * 64, warp_column = warp % 4 * 64;
  float c[4][8][4] = {};
  for (int step = 0; step < steps; ++step) {
    copy_wait<1>();
    block_barrier();
    const char* const stage = text_memory + step % 2 * kTextStage;
    const char* const image_slice = image_memory + step % image_slices * kImageSlice;
    BLIP2FAST_UNROLL
    for (int k = 0; k < kSlice / 16; ++k) {
      uint32_t a[4][4], b[4][4];
      BLIP2FAST_UNROLL
      for (int m = 0; m < 4; ++m)
        load_matrices(a[m], stage + swizzled(warp_text + 16 * m + lane % 16, 2 * k + lane / 16));
      BLIP2FAST_UNROLL
      for (int n = 0; n < 4; ++n)
        load_matrices(b[n], image_slice + swizzled(warp_column + 16 * n + lane / 16 * 8 + lane % 8,
                                                   2 * k + lane / 8 % 2));
      BLIP2FAST_UNROLL
      for (int m = 0; m < 4; ++m) {
        BLIP2FAST_UNROLL
        for (int n = 0; n < 8; ++n) {
          const uint32_t right[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          mma<Format>(c[m][n], a[m], right);
        }
      }
    }
    block_barrier();
    fetch(step + 2);
    if (step % slices != slices - 1) continue;

    const int64_t first_text = (first_tile + step / slices) * kTextTile + warp_text;
    BLIP2FAST_UNROLL
    for (int m = 0; m < 4; ++m) {
      BLIP2FAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        BLIP2FAST_UNROLL
        for (int i = 0; i < 2; ++i) {
          Best best = {-kInfinity, 2 * t};  // of the quad the lowest: query 0 if all are
          BLIP2FAST_UNROLL
          for (int n = 0; n < 4; ++n) {
            BLIP2FAST_UNROLL
            for (int e = 0; e < 2; ++e) {
              const int query = 8 * n + 2 * t + e;
              const float value = c[m][4 * i + n][2 * half + e];
              if (query < p.queries && exceeds(value, best.value)) best = {value, query};
            }
          }
          best = quad_best(best);
          const int64_t image = first_image + warp_column / kItcQueries + i;
          const int64_t text = first_text + 16 * m + 8 * half + g;
          // the four lanes of a row share the writing: each takes one m
          if (t == m && image < p.end && text < p.texts) {
            p.sim[(image - p.begin) * p.texts + text] = best.value;
            p.arg[(image - p.begin) * p.texts + text] = static_cast<uint8_t>(best.query);
          }
        }
      }
    }
    BLIP2FAST_UNROLL
    for (int m = 0; m < 4; ++m) {
      BLIP2FAST_UNROLL
      for (int n = 0; n < 8; ++n) {
        BLIP2FAST_UNROLL
        for (int e = 0; e < 4; ++e) c[m][n][e] = 0.0f;
      }
    }
  }
}

}  // namespace blip2fast
