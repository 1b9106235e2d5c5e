// Attention of many small query blocks to the keys of an image or a window: parameters and launch.
// kernels/qformer_attention/README.md has the maths and the meaning of every tensor.
#pragma once

#include <cstdint>

#include "format16.h"

namespace blip2fast {

// Strides in elements; the head dimension itself is contiguous.
struct CrossAttention {
  int64_t blocks, images;  // N, B
  int queries, keys, heads, dim;
  float scale;

  const uint16_t* q;  // [N, Q, H, D]
  int64_t q_block, q_head;
  int q_query;         // Q * q_query and S * kv_key are below 2^31
  const uint16_t* kv;  // [B, S, 2, H, D]
  int64_t kv_image, kv_part, kv_head;
  int kv_key;
  const int32_t* kv_index;  // [N], or null: block i reads image i
  const bool* key_mask;     // [B, S] contiguous, or null

  const int64_t* philox;  // [2], or null: no dropout
  uint32_t threshold;
  float keep_scale;  // 1 / (1 - p)

  uint16_t* out;  // [N, Q, H, D] contiguous
  float* lse;     // [N, Q, H]

  // backward
  const uint16_t* dout;    // [N, Q, H, D] contiguous
  const int32_t* order;    // [N] blocks sorted by image, or null where kv_index is
  const int32_t* offsets;  // [B + 1]
  float* delta;            // [N, Q, H] workspace, unless cross_attention_fuses
  uint16_t* dq;            // [N, Q, H, D]
  int64_t dq_block, dq_query, dq_head;
  uint16_t* dkv;  // [B, S, 2, H, D]
  int64_t dkv_image, dkv_key, dkv_part, dkv_head;
};

// Whether the backward pass is one launch that reads everything once.
bool cross_attention_fuses(const CrossAttention& p);

// On a cudaStream_t. Raise std::runtime_error where a launch fails.
void cross_attention_forward(const CrossAttention& p, Format16 format, void* stream);
void cross_attention_backward(const CrossAttention& p, Format16 format, void* stream);

}  // namespace blip2fast
