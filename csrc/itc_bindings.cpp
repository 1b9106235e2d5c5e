// The contrastive sweep over all pairs of itc.h as operators on tensors.

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "itc.h"

namespace blip2fast {
namespace {

// Similarities of a chunk of rows are 5 bytes a pair; where they are not kept, this many at once.
#ifdef BLIP2FAST_EMULATED
constexpr int64_t kChunkBytes = 48 << 10;  // several chunks in a small test
#else
constexpr int64_t kChunkBytes = 256 << 20;
#endif

const int64_t* ids(const std::optional<Tensor>& tensor, int64_t length, const Tensor& like,
                   const char* name) {
  return tensor.has_value() ? int64_list(*tensor, length, like, name) : nullptr;
}

float* floats(const Tensor& tensor, int64_t length, const Tensor& like, const char* name) {
  check_list(tensor, ScalarType::Float, "float32", length, like, name);
  return pointer<float>(tensor);
}

ItcSweep itc_pairs(const Tensor& image, const Tensor& text, const Tensor& temp,
                   const std::optional<Tensor>& row_ids, const std::optional<Tensor>& column_ids,
                   int64_t first_row) {
  check_rows(image, "image", image, 3);
  check_rows(text, "text", image, 2);
  const int64_t M = image.size(0), N = text.size(0), Q = image.size(1), D = image.size(2);
  constexpr int64_t kReach = int64_t{1} << 31;
  STD_TORCH_CHECK(M > 0 && N > 0 && M < kReach && N < kReach, "no images, or no texts");
  STD_TORCH_CHECK(text.size(1) == D && D % 8 == 0 && D >= 8 && D <= kItcWidth,
                  "feature width: expected a multiple of 8 up to 256, got ", D);
  STD_TORCH_CHECK(Q >= 1 && Q <= kItcQueries, "queries: expected 1 to 32, got ", Q);
  STD_TORCH_CHECK(row_ids.has_value() == column_ids.has_value(), "ids: expected both or none");
  ItcSweep p = {};
  p.image = pointer<const uint16_t>(image);
  p.image_row = image.stride(0);
  p.image_query = image.stride(1);
  p.text = pointer<const uint16_t>(text);
  p.text_row = text.stride(0);
  p.images = M;
  p.texts = N;
  p.queries = static_cast<int>(Q);
  p.dim = static_cast<int>(D);
  p.temp = floats(temp, 1, image, "temp");
  p.row_ids = ids(row_ids, M, image, "row_ids");
  p.column_ids = ids(column_ids, N, image, "column_ids");
  p.first_row = first_row;
  p.segment_rows = itc_segment_rows(M);
  return p;
}

// Run `visit` for one chunk of rows after the other, over the same memory.
template <typename Visit>
void for_each_chunk(ItcSweep& p, const Tensor& like, const Visit& visit) {
  const int64_t fitting = kChunkBytes / (5 * p.texts) / p.segment_rows * p.segment_rows;
  const int64_t chunk = std::min(std::max(fitting, p.segment_rows), p.images);
  const Tensor sim = torch::stable::new_empty(like, {chunk, p.texts}, ScalarType::Float);
  const Tensor arg = torch::stable::new_empty(like, {chunk, p.texts}, ScalarType::Byte);
  p.sim = pointer<float>(sim);
  p.arg = pointer<uint8_t>(arg);
  for (p.begin = 0; p.begin < p.images; p.begin += chunk) {
    p.end = std::min(p.begin + chunk, p.images);
    visit();
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> itc_sweep(
    const Tensor& image, const Tensor& text, const Tensor& temp,
    const std::optional<Tensor>& row_ids, const std::optional<Tensor>& column_ids,
    const std::optional<Tensor>& philox, int64_t first_row, bool save) {
  auto p = itc_pairs(image, text, temp, row_ids, column_ids, first_row);
  p.philox = ids(philox, 2, image, "philox");
  const auto format = format_of(image);
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(image, shape, type);
  };
  const int64_t M = p.images, N = p.texts, S = kItcStatistics;
  const int64_t segments = (M + p.segment_rows - 1) / p.segment_rows;
  Tensor rows = empty({S, M}, ScalarType::Float), columns = empty({S, N}, ScalarType::Float);
  Tensor row_index = empty({2, M}, ScalarType::Long);
  Tensor column_index = empty({2, N}, ScalarType::Long);
  const Tensor parts = empty({segments, S, N}, ScalarType::Float);
  const Tensor part_index = empty({segments, 2, N}, ScalarType::Int);
  Tensor sim = empty({save ? M : 0, save ? N : 0}, ScalarType::Float);
  Tensor arg = empty({save ? M : 0, save ? N : 0}, ScalarType::Byte);
  p.rows = pointer<float>(rows);
  p.columns = pointer<float>(columns);
  p.row_index = pointer<int64_t>(row_index);
  p.column_index = pointer<int64_t>(column_index);
  p.parts = pointer<float>(parts);
  p.part_index = pointer<int32_t>(part_index);
  const Launching launching(image);
  const auto visit = [&] {
    itc_similarity(p, format, launching.stream());
    itc_statistics(p, launching.stream());
  };
  if (save) {
    p.sim = pointer<float>(sim);
    p.arg = pointer<uint8_t>(arg);
    p.begin = 0;
    p.end = M;
    visit();
  } else {
    for_each_chunk(p, image, visit);
  }
  itc_join_columns(p, launching.stream());
  return {rows, columns, row_index, column_index, sim, arg};
}

std::tuple<Tensor, Tensor, Tensor> itc_sweep_grad(
    const Tensor& image, const Tensor& text, const Tensor& temp, const Tensor& row_lse,
    const Tensor& row_weight, const Tensor& column_lse, const Tensor& column_weight,
    const std::optional<Tensor>& row_ids, const std::optional<Tensor>& column_ids,
    int64_t first_row, bool local, const Tensor& sim, const Tensor& arg) {
  auto p = itc_pairs(image, text, temp, row_ids, column_ids, first_row);
  const auto format = format_of(image);
  const int64_t M = p.images, N = p.texts, D = p.dim;
  p.row_lse = floats(row_lse, M, image, "row_lse");
  p.row_weight = floats(row_weight, 3 * M, image, "row_weight");
  p.column_lse = floats(column_lse, N, image, "column_lse");
  p.column_weight = floats(column_weight, 3 * N, image, "column_weight");
  p.local = local;
  const Launching launching(image);
  p.text_splits = itc_text_splits(M, N);
  Tensor d_image = torch::stable::new_empty(image, {M, p.queries, D});
  Tensor d_text = torch::stable::new_empty(text, {N, D});
  Tensor d_temp = torch::stable::empty_like(temp);
  const Tensor d_text_parts =
      torch::stable::new_empty(image, {p.text_splits, N, D}, ScalarType::Float);
  const Tensor d_temp_parts = torch::stable::new_empty(image, {(M + 3) / 4}, ScalarType::Float);
  const Tensor scale = torch::stable::new_empty(image, {2}, ScalarType::Float);
  p.scale = pointer<float>(scale);
  p.d_image = pointer<uint16_t>(d_image);
  p.d_text = pointer<uint16_t>(d_text);
  p.d_temp = pointer<float>(d_temp);
  p.d_text_parts = pointer<float>(d_text_parts);
  p.d_temp_parts = pointer<float>(d_temp_parts);
  itc_gradient_scale(p, launching.stream());
  if (sim.numel() > 0) {
    p.sim = floats(sim, M * N, image, "sim");
    check_list(arg, ScalarType::Byte, "uint8", M * N, image, "arg");
    p.arg = pointer<uint8_t>(arg);
    p.begin = 0;
    p.end = M;
    itc_gradient(p, format, launching.stream());
  } else {
    for_each_chunk(p, image, [&] {
      itc_similarity(p, format, launching.stream());
      itc_gradient(p, format, launching.stream());
    });
  }
  itc_join_gradient(p, format, launching.stream());
  return {d_image, d_text, d_temp};
}

}  // namespace

BLIP2FAST_FRAGMENT(m) {
  m.def(
      "itc_sweep(Tensor image, Tensor text, Tensor temp, Tensor? row_ids, Tensor? column_ids, "
      "Tensor? philox, int first_row, bool save) -> (Tensor rows, Tensor columns, "
      "Tensor row_index, Tensor column_index, Tensor sim, Tensor arg)");
  m.def(
      "itc_sweep_grad(Tensor image, Tensor text, Tensor temp, Tensor row_lse, "
      "Tensor row_weight, Tensor column_lse, Tensor column_weight, Tensor? row_ids, "
      "Tensor? column_ids, int first_row, bool local, Tensor sim, Tensor arg) -> "
      "(Tensor d_image, Tensor d_text, Tensor d_temp)");
}

BLIP2FAST_ON_DEVICE(m) {
  m.impl("itc_sweep", TORCH_BOX(&itc_sweep));
  m.impl("itc_sweep_grad", TORCH_BOX(&itc_sweep_grad));
}

}  // namespace blip2fast
