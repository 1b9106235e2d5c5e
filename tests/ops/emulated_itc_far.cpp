// The kernels of the ITC sweep beyond 2^31 pairs: the last blocks alone, on memory that is there
// where they touch it. Ends with 77 where the machine does not lend that many addresses.
#include <sys/mman.h>

#include "itc_gradient.h"
#include "itc_gradient_sm90.h"
#include "itc_similarity.h"
#include "itc_similarity_sm90.h"
#include "itc_statistics.h"

using namespace blip2fast;

namespace {

constexpr int64_t kImages = (int64_t{1} << 25) + 64, kTexts = 70, kFirst = kImages - 8;
constexpr int kQueries = 3, kDim = 8;
constexpr int64_t kTextRow = int64_t{1} << 26;  // elements from a text to the next
static_assert(kFirst * kTexts > int64_t{1} << 31 && kTexts * kTextRow > int64_t{1} << 31);

template <typename T>
T* far_memory(int64_t count) {
  void* at = mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) std::exit(77);
  return static_cast<T*>(at);
}

// Small whole numbers: sums are exact in any order.
float image_value(int64_t i, int q, int d) {
  return (i * 31 + q * 17 + d * 5) % 7 - 3;
}
float text_value(int64_t j, int d) {
  return (j * 13 + d * 3) % 5 - 2;
}

template <typename Params>
void run_block(void (*kernel)(Params), int64_t index, int threads, int shared, Params params) {
  emulated::Block block;
  block.index = index;
  block.shared = std::vector<char>(shared, '\xFF');
  block.threads = std::vector<emulated::Thread>(threads);
  block.body = [&] { kernel(params); };
  emulated::run_block(block);
}

void check(bool right, const char* what) {
  if (!right) emulated::fail(what);
}

// Over the 8 images and all texts.
template <typename Visit>
void each_pair(const Visit& visit) {
  for (int64_t i = kFirst; i < kImages; ++i)
    for (int64_t j = 0; j < kTexts; ++j) visit(i, j);
}

ItcSweep make_sweep() {
  ItcSweep p = {};
  auto* image = far_memory<uint16_t>(kImages * kQueries * kDim);
  auto* text = far_memory<uint16_t>(kTexts * kTextRow);
  for (int64_t i = kFirst; i < kImages; ++i)
    for (int n = 0; n < kQueries * kDim; ++n)
      image[i * kQueries * kDim + n] = emulated::encode<Half>(image_value(i, n / kDim, n % kDim));
  for (int64_t j = 0; j < kTexts; ++j)
    for (int d = 0; d < kDim; ++d)
      text[j * kTextRow + d] = emulated::encode<Half>(text_value(j, d));
  auto* temp = far_memory<float>(1);
  *temp = 1.0f;
  p.image = image, p.image_row = kQueries * kDim, p.image_query = kDim;
  p.text = text, p.text_row = kTextRow;
  p.images = p.end = kImages, p.texts = kTexts, p.queries = kQueries, p.dim = kDim, p.temp = temp;
  p.sim = far_memory<float>(kImages * kTexts);
  p.arg = far_memory<uint8_t>(kImages * kTexts);
  p.rows = far_memory<float>(kItcStatistics * kImages);
  p.row_index = far_memory<int64_t>(2 * kImages);
  return p;
}

void check_similarity(const ItcSweep& p, const char* what) {
  each_pair([&](int64_t i, int64_t j) {
    float best = -kInfinity;
    int at = 0;
    for (int q = 0; q < kQueries; ++q) {
      float sum = 0.0f;
      for (int d = 0; d < kDim; ++d) sum += image_value(i, q, d) * text_value(j, d);
      if (sum > best) best = sum, at = q;
    }
    float& found = p.sim[i * kTexts + j];
    uint8_t& query = p.arg[i * kTexts + j];
    check(found == best && query == at, what);
    found = -1e30f, query = 255;  // for the next
  });
}

void similarities(const ItcSweep& p) {
  // the last 8 images, and the only tile of texts
  const int64_t groups = (kImages + kImageTile - 1) / kImageTile;
  const SimilarityParams params = {p, {groups, 1, 1, 1}, 1};
  const auto run = [&](int capability) {
    emulated::capability() = capability;
    if (capability == 90) {
      run_block(itc_similarity_sm90_kernel<Half>, groups - 1, kGroups * kWarpgroup,
                similarity_sm90_shared(kDim), params);
    } else {
      run_block(itc_similarity_kernel<Half>, groups - 1, kSimilarityThreads,
                kImageSlice + 2 * kTextStage, params);
    }
  };
  run(80);
  check_similarity(p, "mma.sync: wrong");
  run(90);
  check_similarity(p, "wgmma: wrong");
  run(80);
}

void statistics(const ItcSweep& p) {
  constexpr int kRows = kStatisticsThreads / 32;
  for (int64_t block = kFirst / kRows; block * kRows < kImages; ++block)
    run_block(itc_rows_kernel, block, kStatisticsThreads, 0, p);
  for (int64_t i = kFirst; i < kImages; ++i) {
    double sum = 0.0, exponentials = 0.0;
    for (int64_t j = 0; j < kTexts; ++j) {
      sum += p.sim[i * kTexts + j];
      exponentials += std::exp(p.sim[i * kTexts + j]);
    }
    check(std::fabs(p.rows[i] - std::log(exponentials)) < 1e-4, "log-sum-exp of a row: wrong");
    check(p.rows[p.images + i] == static_cast<float>(sum), "sum of a row: wrong");
  }
}

// The pair's gradient is 1 for every pair: a sum of features. Of images, then of texts.
using GradientKernel = void (*)(ItcSweep);
void gradients(ItcSweep p, GradientKernel of_image, GradientKernel of_text) {
  auto* row_weight = far_memory<float>(3 * kImages);
  for (int64_t i = kFirst; i < kImages; ++i) row_weight[kImages + i] = 1.0f;
  auto* row_lse = far_memory<float>(kImages);
  p.row_lse = row_lse, p.row_weight = row_weight;
  p.column_lse = far_memory<float>(kTexts), p.column_weight = far_memory<float>(3 * kTexts);
  p.d_image = far_memory<uint16_t>(kImages * kQueries * kDim);
  p.d_temp_parts = far_memory<float>(kImages);
  float scale[] = {64.0f, 1.0f / 64.0f};
  p.scale = scale;
  p.text_splits = static_cast<int>(kImages / 8);
  p.d_text_parts = far_memory<float>(p.text_splits * kTexts * kDim);

  constexpr int kOwned = kGradientRows / kItcQueries;
  for (int64_t block = kFirst / kOwned; block * kOwned < kImages; ++block)
    run_block(of_image, block, kGradientThreads, kGradientShared, p);
  run_block(of_text, int64_t{p.text_splits} - 1, kGradientThreads, kGradientShared, p);
  std::vector<float> d_image(8 * kQueries * kDim), d_text(kTexts * kDim);
  each_pair([&](int64_t i, int64_t j) {
    const int q = p.arg[i * kTexts + j];
    for (int d = 0; d < kDim; ++d) {
      d_image[((i - kFirst) * kQueries + q) * kDim + d] += text_value(j, d);
      d_text[j * kDim + d] += image_value(i, q, d);
    }
  });
  for (size_t n = 0; n < d_image.size(); ++n) {
    const uint16_t found = p.d_image[kFirst * kQueries * kDim + n];
    check(emulated::decode<Half>(found) == d_image[n], "gradient of an image: wrong");
  }
  for (size_t n = 0; n < d_text.size(); ++n) {
    const int64_t last = (p.text_splits - 1) * kTexts * kDim;
    check(p.d_text_parts[last + n] == d_text[n], "gradient of a text: wrong");
  }
}

}  // namespace

int main() {
  const ItcSweep p = make_sweep();
  similarities(p);
  statistics(p);
  gradients(p, itc_gradient_kernel<Half, true>, itc_gradient_kernel<Half, false>);
  gradients(p, itc_gradient_sm90_kernel<Half, true>, itc_gradient_sm90_kernel<Half, false>);
}
