#include "itc.h"
#include "itc_gradient.h"
#include "itc_similarity.h"
#include "itc_statistics.h"

namespace blip2fast {
namespace {

int64_t ceil_divide(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

template <typename Format>
void similarity(const ItcSweep& p, void* stream) {
  const int slices = similarity_slices(p.dim);
  const bool fits = similarity_shared(slices) <= shared_limit();
  const SimilarityParams params = {p, similarity_grid(p.end - p.begin, p.texts, multiprocessors()),
                                   fits ? slices : 2};
  launch("itc_similarity_kernel", itc_similarity_kernel<Format>,
         params.grid.groups * params.grid.splits, kSimilarityThreads, stream, params,
         similarity_shared(params.image_slices));
}

template <typename Format>
void gradient(const ItcSweep& p, void* stream) {
  launch("itc_gradient_kernel of images", itc_gradient_kernel<Format, true>,
         image_gradient_blocks(p), kGradientThreads, stream, p, kGradientShared);
  launch("itc_gradient_kernel of texts", itc_gradient_kernel<Format, false>,
         text_gradient_blocks(p), kGradientThreads, stream, p, kGradientShared);
}

template <typename Format>
void join_gradient(const ItcSweep& p, void* stream) {
  launch("itc_join_text_kernel", itc_join_text_kernel<Format>,
         ceil_divide(p.texts * p.dim, 2 * kStatisticsThreads), kStatisticsThreads, stream, p);
  launch("itc_join_temp_kernel", itc_join_temp_kernel, 1, 32, stream, p);
}

}  // namespace

int64_t itc_segment_rows(int64_t images) {
  const int64_t rows = ceil_divide(images, kItcMaxSegments);
  return ceil_divide(rows > 64 ? rows : 64, kImageTile) * kImageTile;
}

int itc_text_splits(int64_t images, int64_t texts) {
  // at least 32 images to a part; a block's 128 rows of 256 sums in fp32 cost about 20 to write
  return static_cast<int>(quickest_splits(ceil_divide(texts, kGradientRows), images, 20,
                                          images / 32, multiprocessors()));
}

void itc_similarity(const ItcSweep& p, Format16 format, void* stream) {
  // every build with CUDA has the code for sm_90a
  if (compute_capability() == 90) return itc_similarity_sm90(p, format, stream);
  format == Format16::kHalf ? similarity<Half>(p, stream) : similarity<BFloat16>(p, stream);
}

void itc_statistics(const ItcSweep& p, void* stream) {
  launch("itc_rows_kernel", itc_rows_kernel, ceil_divide(p.end - p.begin, kStatisticsThreads / 32),
         kStatisticsThreads, stream, p);
  const int64_t across = ceil_divide(p.texts, 2 * kStatisticsThreads);
  launch("itc_columns_kernel", itc_columns_kernel,
         across * ceil_divide(p.end - p.begin, p.segment_rows), kStatisticsThreads, stream, p);
}

void itc_join_columns(const ItcSweep& p, void* stream) {
  launch("itc_join_columns_kernel", itc_join_columns_kernel,
         ceil_divide(p.texts, kStatisticsThreads), kStatisticsThreads, stream, p);
}

void itc_gradient_scale(const ItcSweep& p, void* stream) {
  launch("itc_scale_kernel", itc_scale_kernel, 1, kScaleThreads, stream, p,
         kScaleThreads / 32 * static_cast<int>(sizeof(float)));
}

void itc_gradient(const ItcSweep& p, Format16 format, void* stream) {
  if (compute_capability() == 90) return itc_gradient_sm90(p, format, stream);
  format == Format16::kHalf ? gradient<Half>(p, stream) : gradient<BFloat16>(p, stream);
}

void itc_join_gradient(const ItcSweep& p, Format16 format, void* stream) {
  format == Format16::kHalf ? join_gradient<Half>(p, stream) : join_gradient<BFloat16>(p, stream);
}

}  // namespace blip2fast
