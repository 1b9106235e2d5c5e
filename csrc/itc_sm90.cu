// Compiled for sm_90a alone, of which wgmma is a part.
#include "itc_gradient_sm90.h"
#include "itc_similarity_sm90.h"

namespace blip2fast {
namespace {

template <typename Format>
void similarity(const ItcSweep& p, void* stream) {
  const SimilarityParams params = {p, similarity_grid(p.end - p.begin, p.texts, multiprocessors()),
                                   similarity_slices(p.dim)};
  launch("itc_similarity_sm90_kernel", itc_similarity_sm90_kernel<Format>,
         params.grid.groups * params.grid.splits, kGroups * kWarpgroup, stream, params,
         similarity_sm90_shared(p.dim));
}

template <typename Format>
void gradient(const ItcSweep& p, void* stream) {
  launch("itc_gradient_sm90_kernel of images", itc_gradient_sm90_kernel<Format, true>,
         image_gradient_blocks(p), kGradientThreads, stream, p, kGradientShared);
  launch("itc_gradient_sm90_kernel of texts", itc_gradient_sm90_kernel<Format, false>,
         text_gradient_blocks(p), kGradientThreads, stream, p, kGradientShared);
}

}  // namespace

void itc_similarity_sm90(const ItcSweep& p, Format16 format, void* stream) {
  format == Format16::kHalf ? similarity<Half>(p, stream) : similarity<BFloat16>(p, stream);
}

void itc_gradient_sm90(const ItcSweep& p, Format16 format, void* stream) {
  format == Format16::kHalf ? gradient<Half>(p, stream) : gradient<BFloat16>(p, stream);
}

}  // namespace blip2fast
