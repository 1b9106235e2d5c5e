#pragma once

#include "fragments.h"
#include "philox.h"
#include "qformer_attention.h"

namespace blip2fast {

constexpr int kWarps = 4;  // of a block; each works alone

// The rows [Q, D] of one block and head, or the keys or values [S, D] of one image and head.
BLIP2FAST_DEVICE Rows rows_of(const CrossAttention& p, const uint16_t* contiguous, int64_t block,
                              int head) {
  const int row = p.heads * p.dim;
  return {contiguous + block * p.queries * row + head * p.dim, row, p.queries, p.dim};
}
BLIP2FAST_DEVICE Rows queries_of(const CrossAttention& p, int64_t block, int head) {
  return {p.q + block * p.q_block + head * p.q_head, p.q_query, p.queries, p.dim};
}
BLIP2FAST_DEVICE Rows keys_of(const CrossAttention& p, int64_t image, int head, int part) {
  return {p.kv + image * p.kv_image + head * p.kv_head + part * p.kv_part, p.kv_key, p.keys, p.dim};
}

// Have the keys and values of the next tile on their way to the second-level cache; a lane asks for
// one row, whose first 128 bytes are one line.
BLIP2FAST_DEVICE void prefetch_keys(const Rows& keys, const Rows& values, int first) {
  const int lane = thread_index() % 32, row = first + lane % kTile;
  const uint16_t* data = lane < kTile ? keys.data : values.data;
  if (row < keys.count) prefetch(data + row * keys.stride);
}

// Bit e: this lane's key 4t + e of the tile that starts at `first` exists and is not masked.
BLIP2FAST_DEVICE unsigned visible_keys(const CrossAttention& p, int64_t image, int first) {
  const int key = first + 4 * (thread_index() % 4);
  unsigned visible = 0;
  BLIP2FAST_UNROLL
  for (int e = 0; e < 4; ++e) {
    const bool exists = key + e < p.keys;
    if (exists && (p.key_mask == nullptr || p.key_mask[image * p.keys + key + e]))
      visible |= 1u << e;
  }
  return visible;
}

// Bit e: dropout keeps key 4t + e of the tile for a query.
BLIP2FAST_DEVICE unsigned kept_keys(const CrossAttention& p, PhiloxKey philox, int64_t row,
                                    int head, int first) {
  const uint32_t group = static_cast<uint32_t>(first / 4 + thread_index() % 4);
  const PhiloxWords words =
      philox_words(philox, group, static_cast<uint32_t>(row), static_cast<uint32_t>(head));
  unsigned kept = 0;
  BLIP2FAST_UNROLL
  for (int e = 0; e < 4; ++e) kept |= (words.word[e] >= p.threshold ? 1u : 0u) << e;
  return kept;
}

// One warp: 16 * M queries of a block and head against all keys, 16 at a time, with a running
// softmax. Consecutive warps are consecutive heads, whose keys lie side by side in memory.
template <typename Format, int D, int M>
BLIP2FAST_KERNEL(32 * kWarps, M* D <= 64 ? 3 : 2)
cross_attention_forward_kernel(const CrossAttention p) {
  const int row_tiles = (p.queries + kTile * M - 1) / (kTile * M);
  const int64_t warp = block_index() * kWarps + thread_index() / 32;
  if (warp >= p.blocks * row_tiles * p.heads) return;
  const int head = static_cast<int>(warp % p.heads);
  const int first_row = static_cast<int>(warp / p.heads % row_tiles) * kTile * M;
  const int64_t block = warp / p.heads / row_tiles;
  const int64_t image = p.kv_index == nullptr ? block : p.kv_index[block];
  const int g = thread_index() % 32 / 4;

  const Rows key_rows = keys_of(p, image, head, 0), value_rows = keys_of(p, image, head, 1);
  const PhiloxKey philox = p.philox == nullptr ? PhiloxKey{} : philox_key(p.philox);
  const float scale = p.scale * kLog2E;

  LeftRows<D> query[M];
  Accumulator<D> out[M];
  float row_max[M][2], row_sum[M][2];
  BLIP2FAST_UNROLL
  for (int m = 0; m < M; ++m) {
    query[m].load(queries_of(p, block, head), first_row + kTile * m);
    out[m].clear();
    row_max[m][0] = row_max[m][1] = -kInfinity;
    row_sum[m][0] = row_sum[m][1] = 0.0f;
  }

  for (int first = 0; first < p.keys; first += kTile) {
    if (first + kTile < p.keys) prefetch_keys(key_rows, value_rows, first + kTile);
    RightKeys<D> key;
    RightColumns<D> value;
    key.load(key_rows, first);
    value.load_keys(value_rows, first);
    const unsigned visible = visible_keys(p, image, first);
    BLIP2FAST_UNROLL
    for (int m = 0; m < M; ++m) {
      float score[2][4] = {};
      BLIP2FAST_UNROLL
      for (int s = 0; s < D / 16; ++s) {
        mma<Format>(score[0], query[m].step[s], key.step[s][0]);
        mma<Format>(score[1], query[m].step[s], key.step[s][1]);
      }
      float shrink[2];
      uint32_t probability[4];
      BLIP2FAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        float x[4];  // of keys 4t .. 4t + 3
        BLIP2FAST_UNROLL
        for (int e = 0; e < 4; ++e) {
          x[e] = visible >> e & 1 ? score[e / 2][2 * half + e % 2] * scale : -kInfinity;
        }
        const float tile_max = quad_max(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])));
        const float new_max = fmaxf(row_max[m][half], tile_max);
        // a row that has seen nothing subtracts 0: exp2(-inf - 0) is 0, not NaN
        const float subtract = new_max == -kInfinity ? 0.0f : new_max;
        shrink[half] = exp2f(row_max[m][half] - subtract);
        row_max[m][half] = new_max;
        float sum = 0.0f;
        BLIP2FAST_UNROLL
        for (int e = 0; e < 4; ++e) {
          x[e] = exp2f(x[e] - subtract);
          sum += x[e];
        }
        row_sum[m][half] = row_sum[m][half] * shrink[half] + sum;
        if (p.philox != nullptr) {
          const int64_t row = block * p.queries + first_row + kTile * m + 8 * half + g;
          const unsigned kept = kept_keys(p, philox, row, head, first);
          BLIP2FAST_UNROLL
          for (int e = 0; e < 4; ++e) x[e] = kept >> e & 1 ? x[e] : 0.0f;
        }
        probability[half] = pack<Format>(x[0], x[1]);
        probability[half + 2] = pack<Format>(x[2], x[3]);
      }
      out[m].scale(shrink[0], shrink[1]);
      out[m].template add<Format>(probability, value);
    }
  }

  BLIP2FAST_UNROLL
  for (int m = 0; m < M; ++m) {
    float sum[2], inverse[2];
    BLIP2FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      sum[half] = quad_sum(row_sum[m][half]);
      inverse[half] = sum[half] > 0.0f ? p.keep_scale / sum[half] : 0.0f;
    }
    out[m].scale(inverse[0], inverse[1]);
    BLIP2FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + kTile * m + 8 * half + g;
      if (row >= p.queries) continue;
      const int64_t at = (block * p.queries + row) * p.heads + head;
      out[m].template store<Format>(p.out + at * p.dim, half, p.dim);
      if (thread_index() % 4 == 0)
        p.lse[at] = sum[half] > 0.0f ? (row_max[m][half] + log2f(sum[half])) * kLn2 : -kInfinity;
    }
  }
}

}  // namespace blip2fast
