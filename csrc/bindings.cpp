// The operators of blip2fast/_C.so, through PyTorch's stable ABI: one binary for torch 2.10 and
// later and for every Python. Kernels know nothing of torch; checks for users are in
// blip2fast/ops/, those here keep a direct call from reading out of bounds.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "philox_cpu.h"

#if defined(BLIP2FAST_CUDA) || defined(BLIP2FAST_EMULATED)
#define BLIP2FAST_KERNELS
#include "itc.h"
#include "qformer_attention.h"
#endif

#ifdef BLIP2FAST_CUDA
#include <torch/csrc/stable/accelerator.h>
// in torch's CUDA library, which a CPU build of torch does not have
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_int64(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous(), name,
                  ": expected contiguous int64");
}

Tensor philox_keep_mask(const Tensor& philox, const Tensor& rows, const Tensor& heads,
                        int64_t threshold, int64_t columns, int64_t first_column) {
  check_int64(philox, "philox");
  check_int64(rows, "rows");
  check_int64(heads, "heads");
  STD_TORCH_CHECK(philox.numel() == 2, "philox: expected 2 elements, got ", philox.numel());
  STD_TORCH_CHECK(rows.dim() == 1 && heads.dim() == 1 && rows.size(0) == heads.size(0),
                  "rows and heads: expected one shape [n]");
  STD_TORCH_CHECK(threshold >= 0 && threshold < (int64_t{1} << 32),
                  "threshold: expected 0 to 2^32 - 1, got ", threshold);
  STD_TORCH_CHECK(columns >= 0 && first_column >= 0, "columns: expected 0 or more");
  Tensor keep = torch::stable::new_empty(rows, {rows.size(0), columns}, ScalarType::Bool);
  const auto key = blip2fast::philox_key(philox.const_data_ptr<int64_t>());
  const int64_t* row = rows.const_data_ptr<int64_t>();
  const int64_t* head = heads.const_data_ptr<int64_t>();
  bool* out = keep.mutable_data_ptr<bool>();
  // a thread is worth starting for about 16,000 elements
  const int64_t grain = std::max<int64_t>(16384 / std::max<int64_t>(columns, 1), 1);
  torch::stable::parallel_for(0, rows.size(0), grain, [&](int64_t begin, int64_t end) {
    blip2fast::philox_keep_rows(key, row + begin, head + begin, end - begin, columns, first_column,
                                static_cast<uint32_t>(threshold), out + begin * columns);
  });
  return keep;
}

#ifdef BLIP2FAST_KERNELS

// The current stream of a tensor's device, which is the current device meanwhile.
class Launching {
 public:
#ifdef BLIP2FAST_CUDA
  explicit Launching(const Tensor& on) : guard_(on.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream_));
  }
#else
  explicit Launching(const Tensor&) {}
#endif
  void* stream() const {
    return stream_;
  }

 private:
#ifdef BLIP2FAST_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

blip2fast::Format16 format_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "expected float16 or bfloat16");
  return type == ScalarType::Half ? blip2fast::Format16::kHalf : blip2fast::Format16::kBFloat16;
}

// Rows are read and written 16 bytes at a time.
void check_rows(const Tensor& tensor, const char* name, ScalarType type, int64_t dims) {
  STD_TORCH_CHECK(tensor.dim() == dims && tensor.scalar_type() == type, name, ": expected ", dims,
                  " dimensions and the dtype of q");
  STD_TORCH_CHECK(tensor.stride(dims - 1) == 1, name, ": expected a contiguous last dimension");
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < dims; ++i)
    aligned &= tensor.size(i) <= 1 || tensor.stride(i) % 8 == 0;
  STD_TORCH_CHECK(aligned, name, ": expected rows that start at multiples of 16 bytes");
}

const int32_t* indices(const std::optional<Tensor>& tensor, const char* name, int64_t length) {
  if (!tensor.has_value()) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Int && tensor->is_contiguous() &&
                      tensor->numel() == length,
                  name, ": expected contiguous int32 [", length, "]");
  return tensor->const_data_ptr<int32_t>();
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

blip2fast::CrossAttention cross_attention(const Tensor& q, const Tensor& kv,
                                          const std::optional<Tensor>& kv_index,
                                          const std::optional<Tensor>& key_mask,
                                          const std::optional<Tensor>& philox, int64_t blocks,
                                          double scale, double dropout_p) {
  check_rows(q, "q", q.scalar_type(), 4);
  check_rows(kv, "kv", q.scalar_type(), 5);
  const int64_t images = kv.size(0), keys = kv.size(1), dim = q.size(3);
  STD_TORCH_CHECK(q.size(0) == blocks || q.size(0) == 1, "q: expected ", blocks, " blocks or 1");
  STD_TORCH_CHECK(kv.size(2) == 2 && kv.size(3) == q.size(2) && kv.size(4) == dim,
                  "kv: expected [B, S, 2, H, D] with H and D of q");
  STD_TORCH_CHECK(dim % 8 == 0 && dim >= 8 && dim <= 128,
                  "head width: expected a multiple of 8 up to 128, got ", dim);
  STD_TORCH_CHECK(kv_index.has_value() || images == blocks, "kv_index: needed unless N is B");
  constexpr int64_t kReach = int64_t{1} << 31;
  STD_TORCH_CHECK(q.size(1) * q.stride(1) < kReach && keys * kv.stride(1) < kReach,
                  "one image or block must span less than 2^31 elements");
  blip2fast::CrossAttention p = {};
  p.blocks = blocks;
  p.images = images;
  p.queries = static_cast<int>(q.size(1));
  p.keys = static_cast<int>(keys);
  p.heads = static_cast<int>(q.size(2));
  p.dim = static_cast<int>(dim);
  p.scale = static_cast<float>(scale);
  p.q = pointer<const uint16_t>(q);
  p.q_block = q.size(0) == 1 ? 0 : q.stride(0);
  p.q_query = static_cast<int>(q.stride(1));
  p.q_head = q.stride(2);
  p.kv = pointer<const uint16_t>(kv);
  p.kv_image = kv.stride(0);
  p.kv_key = static_cast<int>(kv.stride(1));
  p.kv_part = kv.stride(2);
  p.kv_head = kv.stride(3);
  p.kv_index = indices(kv_index, "kv_index", blocks);
  if (key_mask.has_value()) {
    STD_TORCH_CHECK(key_mask->scalar_type() == ScalarType::Bool && key_mask->is_contiguous() &&
                        key_mask->numel() == images * keys,
                    "key_mask: expected contiguous bool [B, S]");
    p.key_mask = key_mask->const_data_ptr<bool>();
  }
  p.keep_scale = 1.0f;
  if (philox.has_value() && dropout_p > 0) {
    check_int64(*philox, "philox");
    STD_TORCH_CHECK(dropout_p < 1, "dropout_p: expected below 1");
    p.philox = philox->const_data_ptr<int64_t>();
    p.threshold = static_cast<uint32_t>(std::floor(dropout_p * 4294967296.0));
    p.keep_scale = static_cast<float>(1.0 / (1.0 - dropout_p));
  }
  return p;
}

std::tuple<Tensor, Tensor> qformer_cross_attention_fwd(const Tensor& q, const Tensor& kv,
                                                       const std::optional<Tensor>& kv_index,
                                                       const std::optional<Tensor>& key_mask,
                                                       const std::optional<Tensor>& philox,
                                                       int64_t num_blocks, double scale,
                                                       double dropout_p) {
  auto p = cross_attention(q, kv, kv_index, key_mask, philox, num_blocks, scale, dropout_p);
  Tensor out = torch::stable::new_empty(q, {num_blocks, q.size(1), q.size(2), q.size(3)});
  Tensor lse = torch::stable::new_empty(q, {num_blocks, q.size(1), q.size(2)}, ScalarType::Float);
  p.out = pointer<uint16_t>(out);
  p.lse = pointer<float>(lse);
  const Launching launching(q);
  blip2fast::cross_attention_forward(p, format_of(q), launching.stream());
  return {out, lse};
}

void qformer_cross_attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& kv, const Tensor& out, const Tensor& lse,
    const std::optional<Tensor>& kv_index, const std::optional<Tensor>& order,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& philox, int64_t num_blocks, double scale, double dropout_p,
    const Tensor& dq, const Tensor& dkv) {
  auto p = cross_attention(q, kv, kv_index, key_mask, philox, num_blocks, scale, dropout_p);
  check_rows(dq, "dq", q.scalar_type(), 4);
  check_rows(dkv, "dkv", q.scalar_type(), 5);
  for (const Tensor* tensor : {&dout, &out}) {
    check_rows(*tensor, "dout and out", q.scalar_type(), 4);
    STD_TORCH_CHECK(tensor->is_contiguous() && tensor->size(0) == num_blocks,
                    "dout and out: expected contiguous [N, Q, H, D]");
  }
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous(),
                  "lse: expected contiguous float32");
  STD_TORCH_CHECK(dq.size(0) == num_blocks, "dq: expected one for each of ", num_blocks, " blocks");
  STD_TORCH_CHECK(!kv_index.has_value() || (order.has_value() && offsets.has_value()),
                  "order and offsets: needed with kv_index");
  p.order = indices(order, "order", num_blocks);
  p.offsets = indices(offsets, "offsets", p.images + 1);
  p.dout = pointer<const uint16_t>(dout);
  p.out = pointer<uint16_t>(out);
  p.lse = pointer<float>(lse);
  p.dq = pointer<uint16_t>(dq);
  p.dq_block = dq.stride(0);
  p.dq_query = dq.stride(1);
  p.dq_head = dq.stride(2);
  p.dkv = pointer<uint16_t>(dkv);
  p.dkv_image = dkv.stride(0);
  p.dkv_key = dkv.stride(1);
  p.dkv_part = dkv.stride(2);
  p.dkv_head = dkv.stride(3);
  const Launching launching(q);
  std::optional<Tensor> delta;
  if (!blip2fast::cross_attention_fuses(p)) {
    delta = torch::stable::empty_like(lse);
    p.delta = pointer<float>(*delta);
  }
  blip2fast::cross_attention_backward(p, format_of(q), launching.stream());
}

// Similarities of a chunk of rows are 5 bytes a pair; where they are not kept, this many at once.
#ifdef BLIP2FAST_EMULATED
constexpr int64_t kChunkBytes = 48 << 10;  // several chunks in a small test
#else
constexpr int64_t kChunkBytes = 256 << 20;
#endif

const int64_t* ids(const std::optional<Tensor>& tensor, const char* name, int64_t length) {
  if (!tensor.has_value()) return nullptr;
  check_int64(*tensor, name);
  STD_TORCH_CHECK(tensor->numel() == length, name, ": expected [", length, "]");
  return tensor->const_data_ptr<int64_t>();
}

float* floats(const Tensor& tensor, const char* name, int64_t length) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                      tensor.numel() == length,
                  name, ": expected contiguous float32, ", length, " elements");
  return pointer<float>(tensor);
}

blip2fast::ItcSweep itc_pairs(const Tensor& image, const Tensor& text, const Tensor& temp,
                              const std::optional<Tensor>& row_ids,
                              const std::optional<Tensor>& column_ids, int64_t first_row) {
  check_rows(image, "image", image.scalar_type(), 3);
  check_rows(text, "text", image.scalar_type(), 2);
  const int64_t M = image.size(0), N = text.size(0), Q = image.size(1), D = image.size(2);
  constexpr int64_t kReach = int64_t{1} << 31;
  STD_TORCH_CHECK(M > 0 && N > 0 && M < kReach && N < kReach, "no images, or no texts");
  STD_TORCH_CHECK(text.size(1) == D && D % 8 == 0 && D >= 8 && D <= blip2fast::kItcWidth,
                  "feature width: expected a multiple of 8 up to 256, got ", D);
  STD_TORCH_CHECK(Q >= 1 && Q <= blip2fast::kItcQueries, "queries: expected 1 to 32, got ", Q);
  STD_TORCH_CHECK(row_ids.has_value() == column_ids.has_value(), "ids: expected both or none");
  blip2fast::ItcSweep p = {};
  p.image = pointer<const uint16_t>(image);
  p.image_row = image.stride(0);
  p.image_query = image.stride(1);
  p.text = pointer<const uint16_t>(text);
  p.text_row = text.stride(0);
  p.images = M;
  p.texts = N;
  p.queries = static_cast<int>(Q);
  p.dim = static_cast<int>(D);
  p.temp = floats(temp, "temp", 1);
  p.row_ids = ids(row_ids, "row_ids", M);
  p.column_ids = ids(column_ids, "column_ids", N);
  p.first_row = first_row;
  p.segment_rows = blip2fast::itc_segment_rows(M);
  return p;
}

// Run `visit` for one chunk of rows after the other, over the same memory.
template <typename Visit>
void for_each_chunk(blip2fast::ItcSweep& p, const Tensor& like, const Visit& visit) {
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
  p.philox = ids(philox, "philox", 2);
  const auto format = format_of(image);
  const auto empty = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(image, shape, type);
  };
  const int64_t M = p.images, N = p.texts, S = blip2fast::kItcStatistics;
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
    blip2fast::itc_similarity(p, format, launching.stream());
    blip2fast::itc_statistics(p, launching.stream());
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
  blip2fast::itc_join_columns(p, launching.stream());
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
  p.row_lse = floats(row_lse, "row_lse", M);
  p.row_weight = floats(row_weight, "row_weight", 3 * M);
  p.column_lse = floats(column_lse, "column_lse", N);
  p.column_weight = floats(column_weight, "column_weight", 3 * N);
  p.local = local;
  p.text_splits = blip2fast::itc_text_splits(M, N);
  Tensor d_image = torch::stable::new_empty(image, {M, p.queries, D});
  Tensor d_text = torch::stable::new_empty(text, {N, D});
  Tensor d_temp = torch::stable::empty_like(temp);
  const Tensor d_text_parts =
      torch::stable::new_empty(image, {p.text_splits, N, D}, ScalarType::Float);
  const Tensor d_temp_parts = torch::stable::new_empty(image, {(M + 3) / 4}, ScalarType::Float);
  p.d_image = pointer<uint16_t>(d_image);
  p.d_text = pointer<uint16_t>(d_text);
  p.d_temp = pointer<float>(d_temp);
  p.d_text_parts = pointer<float>(d_text_parts);
  p.d_temp_parts = pointer<float>(d_temp_parts);
  const Launching launching(image);
  if (sim.numel() > 0) {
    STD_TORCH_CHECK(
        arg.scalar_type() == ScalarType::Byte && arg.is_contiguous() && arg.numel() == M * N,
        "arg: expected contiguous uint8 [M, N]");
    p.sim = floats(sim, "sim", M * N);
    p.arg = pointer<uint8_t>(arg);
    p.begin = 0;
    p.end = M;
    blip2fast::itc_gradient(p, format, launching.stream());
  } else {
    for_each_chunk(p, image, [&] {
      blip2fast::itc_similarity(p, format, launching.stream());
      blip2fast::itc_gradient(p, format, launching.stream());
    });
  }
  blip2fast::itc_join_gradient(p, format, launching.stream());
  return {d_image, d_text, d_temp};
}

#endif  // BLIP2FAST_KERNELS

}  // namespace

#ifdef BLIP2FAST_EMULATED
// the kernels on the host, for tests/ops/test_extension.py
STABLE_TORCH_LIBRARY(blip2fast_emulated, m) {
#else
STABLE_TORCH_LIBRARY(blip2fast_C, m) {
#endif
  m.def(
      "philox_keep_mask(Tensor philox, Tensor rows, Tensor heads, int threshold, int columns, "
      "int first_column) -> Tensor");
#ifdef BLIP2FAST_KERNELS
  m.def(
      "qformer_cross_attention_fwd(Tensor q, Tensor kv, Tensor? kv_index, Tensor? key_mask, "
      "Tensor? philox, int num_blocks, float scale, float dropout_p) -> (Tensor, Tensor)");
  m.def(
      "qformer_cross_attention_bwd(Tensor dout, Tensor q, Tensor kv, Tensor out, "
      "Tensor lse, Tensor? kv_index, Tensor? order, Tensor? offsets, Tensor? key_mask, "
      "Tensor? philox, int num_blocks, float scale, float dropout_p, Tensor(a!) dq, "
      "Tensor(b!) dkv) -> ()");
  m.def(
      "itc_sweep(Tensor image, Tensor text, Tensor temp, Tensor? row_ids, Tensor? column_ids, "
      "Tensor? philox, int first_row, bool save) -> (Tensor rows, Tensor columns, "
      "Tensor row_index, Tensor column_index, Tensor sim, Tensor arg)");
  m.def(
      "itc_sweep_grad(Tensor image, Tensor text, Tensor temp, Tensor row_lse, "
      "Tensor row_weight, Tensor column_lse, Tensor column_weight, Tensor? row_ids, "
      "Tensor? column_ids, int first_row, bool local, Tensor sim, Tensor arg) -> "
      "(Tensor d_image, Tensor d_text, Tensor d_temp)");
#endif
}

#ifdef BLIP2FAST_EMULATED
STABLE_TORCH_LIBRARY_IMPL(blip2fast_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(blip2fast_C, CPU, m) {
#endif
  m.impl("philox_keep_mask", TORCH_BOX(&philox_keep_mask));
}

#ifdef BLIP2FAST_KERNELS
#ifdef BLIP2FAST_EMULATED
STABLE_TORCH_LIBRARY_IMPL(blip2fast_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(blip2fast_C, CUDA, m) {
#endif
  m.impl("qformer_cross_attention_fwd", TORCH_BOX(&qformer_cross_attention_fwd));
  m.impl("qformer_cross_attention_bwd", TORCH_BOX(&qformer_cross_attention_bwd));
  m.impl("itc_sweep", TORCH_BOX(&itc_sweep));
  m.impl("itc_sweep_grad", TORCH_BOX(&itc_sweep_grad));
}
#endif
