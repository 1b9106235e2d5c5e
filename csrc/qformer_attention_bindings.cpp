// The cross-attention of qformer_attention.h as operators on tensors.

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "qformer_attention.h"

namespace blip2fast {
namespace {

const int32_t* indices(const std::optional<Tensor>& tensor, int64_t length, const Tensor& like,
                       const char* name) {
  if (!tensor.has_value()) return nullptr;
  check_list(*tensor, ScalarType::Int, "int32", length, like, name);
  return tensor->const_data_ptr<int32_t>();
}

CrossAttention cross_attention(const Tensor& q, const Tensor& kv,
                               const std::optional<Tensor>& kv_index,
                               const std::optional<Tensor>& key_mask,
                               const std::optional<Tensor>& philox, int64_t blocks, double scale,
                               double dropout_p) {
  check_rows(q, "q", q, 4);
  check_rows(kv, "kv", q, 5);
  const int64_t images = kv.size(0), keys = kv.size(1), dim = q.size(3);
  STD_TORCH_CHECK(q.size(0) == blocks || q.size(0) == 1, "q: expected ", blocks, " blocks or 1");
  STD_TORCH_CHECK(kv.size(2) == 2 && kv.size(3) == q.size(2) && kv.size(4) == dim,
                  "kv: expected [B, S, 2, H, D] with H and D of q");
  STD_TORCH_CHECK(dim % 8 == 0 && dim >= 8 && dim <= 128,
                  "head width: expected a multiple of 8 up to 128, got ", dim);
  STD_TORCH_CHECK(kv_index.has_value() || images == blocks, "kv_index: needed unless N is B");
  constexpr int64_t kReach = int64_t{1} << 31;
  STD_TORCH_CHECK(q.size(1) * q.stride(1) < kReach && keys * kv.stride(1) < kReach &&
                      q.size(1) * q.size(2) * dim < kReach,
                  "one image or block must span less than 2^31 elements");
  CrossAttention p = {};
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
  p.kv_index = indices(kv_index, blocks, q, "kv_index");
  if (key_mask.has_value()) {
    check_list(*key_mask, ScalarType::Bool, "bool", images * keys, q, "key_mask");
    p.key_mask = key_mask->const_data_ptr<bool>();
  }
  p.keep_scale = 1.0f;
  if (philox.has_value() && dropout_p > 0) {
    STD_TORCH_CHECK(dropout_p < 1, "dropout_p: expected below 1");
    p.philox = int64_list(*philox, 2, q, "philox");
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
  cross_attention_forward(p, format_of(q), launching.stream());
  return {out, lse};
}

void qformer_cross_attention_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& kv, const Tensor& out, const Tensor& lse,
    const std::optional<Tensor>& kv_index, const std::optional<Tensor>& order,
    const std::optional<Tensor>& offsets, const std::optional<Tensor>& key_mask,
    const std::optional<Tensor>& philox, int64_t num_blocks, double scale, double dropout_p,
    const Tensor& dq, const Tensor& dkv) {
  auto p = cross_attention(q, kv, kv_index, key_mask, philox, num_blocks, scale, dropout_p);
  check_rows(dq, "dq", q, 4);
  check_shape(dq, {num_blocks, p.queries, p.heads, p.dim}, "dq");
  check_rows(dkv, "dkv", q, 5);
  check_shape(dkv, {p.images, p.keys, 2, p.heads, p.dim}, "dkv");
  for (const Tensor* tensor : {&dout, &out}) {
    check_rows(*tensor, "dout and out", q, 4);
    check_shape(*tensor, {num_blocks, p.queries, p.heads, p.dim}, "dout and out");
    STD_TORCH_CHECK(tensor->is_contiguous(), "dout and out: expected contiguous");
  }
  check_list(lse, ScalarType::Float, "float32", num_blocks * p.queries * p.heads, q, "lse");
  STD_TORCH_CHECK(!kv_index.has_value() || (order.has_value() && offsets.has_value()),
                  "order and offsets: needed with kv_index");
  p.order = indices(order, num_blocks, q, "order");
  p.offsets = indices(offsets, p.images + 1, q, "offsets");
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
  if (!cross_attention_fuses(p)) {
    delta = torch::stable::empty_like(lse);
    p.delta = pointer<float>(*delta);
  }
  cross_attention_backward(p, format_of(q), launching.stream());
}

}  // namespace

BLIP2FAST_FRAGMENT(m) {
  m.def(
      "qformer_cross_attention_fwd(Tensor q, Tensor kv, Tensor? kv_index, Tensor? key_mask, "
      "Tensor? philox, int num_blocks, float scale, float dropout_p) -> (Tensor, Tensor)");
  m.def(
      "qformer_cross_attention_bwd(Tensor dout, Tensor q, Tensor kv, Tensor out, "
      "Tensor lse, Tensor? kv_index, Tensor? order, Tensor? offsets, Tensor? key_mask, "
      "Tensor? philox, int num_blocks, float scale, float dropout_p, Tensor(a!) dq, "
      "Tensor(b!) dkv) -> ()");
}

BLIP2FAST_ON_DEVICE(m) {
  m.impl("qformer_cross_attention_fwd", TORCH_BOX(&qformer_cross_attention_fwd));
  m.impl("qformer_cross_attention_bwd", TORCH_BOX(&qformer_cross_attention_bwd));
}

}  // namespace blip2fast
