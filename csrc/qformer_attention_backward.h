#pragma once

#include "qformer_attention_forward.h"

namespace blip2fast {

// What a query row contributes to every key: kept in registers by the lanes that hold the row.
struct RowStatistics {
  float lse[2];    // of rows g and g + 8, base 2; +inf where a row is absent or sees nothing
  float delta[2];  // sum over d of dout * out

  BLIP2FAST_DEVICE void load_lse(const CrossAttention& p, int64_t block, int head, int first) {
    const int g = thread_index() % 32 / 4;
    BLIP2FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first + 8 * half + g;
      lse[half] = kInfinity;
      if (row >= p.queries) continue;
      const float value = p.lse[(block * p.queries + row) * p.heads + head];
      if (value != -kInfinity) lse[half] = value * kLog2E;
    }
  }
  BLIP2FAST_DEVICE void load_delta(const CrossAttention& p, int64_t block, int head, int first) {
    const int g = thread_index() % 32 / 4;
    BLIP2FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first + 8 * half + g;
      delta[half] = row < p.queries ? p.delta[(block * p.queries + row) * p.heads + head] : 0.0f;
    }
  }
  template <typename Format, int D>
  BLIP2FAST_DEVICE void compute_delta(const LeftRows<D>& dout, const LeftRows<D>& out) {
    BLIP2FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
      BLIP2FAST_UNROLL
      for (int s = 0; s < D / 16; ++s) {
        BLIP2FAST_UNROLL
        for (int part = half; part < 4; part += 2) {
          const float2 a = unpack<Format>(dout.step[s][part]);
          const float2 b = unpack<Format>(out.step[s][part]);
          sum += a.x * b.x + a.y * b.y;
        }
      }
      delta[half] = quad_sum(sum);
    }
  }
};

// c[16 queries, 16 keys] += rows times keys. Operands come from the first-level cache again for
// every tile: the gradients need the registers.
template <typename Format, int D>
BLIP2FAST_DEVICE void multiply(float (&c)[2][4], const Rows& rows, int first_row, const Rows& keys,
                               int first_key) {
  LeftRows<D> left;
  RightKeys<D> right;
  left.load(rows, first_row);
  right.load(keys, first_key);
  BLIP2FAST_UNROLL
  for (int s = 0; s < D / 16; ++s) {
    mma<Format>(c[0], left.step[s], right.step[s][0]);
    mma<Format>(c[1], left.step[s], right.step[s][1]);
  }
}

// Of 16 queries and 16 keys: probabilities after dropout (not yet scaled by 1 / (1 - p)) and the
// gradients of the scores (not yet multiplied by the scale), as left operands over the keys.
struct ScoreTile {
  uint32_t probability[4], gradient[4];

  template <typename Format, int D>
  BLIP2FAST_DEVICE void compute(const CrossAttention& p, PhiloxKey philox, int64_t block, int head,
                                int first_row, int first_key, unsigned visible,
                                const RowStatistics& statistics, const Rows& query,
                                const Rows& dout, const Rows& key, const Rows& value) {
    const int g = thread_index() % 32 / 4;
    float score[2][4] = {}, product[2][4] = {};
    loads_stay_below();
    multiply<Format, D>(score, query, first_row, key, first_key);
    loads_stay_below();
    multiply<Format, D>(product, dout, first_row, value, first_key);
    BLIP2FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      unsigned kept = 0xFu;
      if (p.philox != nullptr) {
        const int64_t row = block * p.queries + first_row + 8 * half + g;
        kept = kept_keys(p, philox, row, head, first_key);
      }
      float dropped[4], gradients[4];
      BLIP2FAST_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float x = score[e / 2][2 * half + e % 2] * (p.scale * kLog2E);
        const float probable = visible >> e & 1 ? exp2f(x - statistics.lse[half]) : 0.0f;
        const bool keep = kept >> e & 1;
        const float upstream = keep ? product[e / 2][2 * half + e % 2] * p.keep_scale : 0.0f;
        dropped[e] = keep ? probable : 0.0f;
        gradients[e] = probable * (upstream - statistics.delta[half]);
      }
      probability[half] = pack<Format>(dropped[0], dropped[1]);
      probability[half + 2] = pack<Format>(dropped[2], dropped[3]);
      gradient[half] = pack<Format>(gradients[0], gradients[1]);
      gradient[half + 2] = pack<Format>(gradients[2], gradients[3]);
    }
  }
};

// From a left operand [16 queries, 16 keys] to its transpose, a left operand [16 keys, 16 queries].
BLIP2FAST_DEVICE void transpose(const uint32_t (&left)[4], uint32_t (&transposed)[4]) {
  transposed[0] = transpose_8x8(left[0]);
  transposed[1] = transpose_8x8(left[2]);
  transposed[2] = transpose_8x8(left[1]);
  transposed[3] = transpose_8x8(left[3]);
}

// Write dk (part 0) or dv (part 1) of 16 keys.
template <typename Format, int D>
BLIP2FAST_DEVICE void store_keys(const CrossAttention& p, const Accumulator<D>& gradient,
                                 int64_t image, int head, int first, int part) {
  const int g = thread_index() % 32 / 4;
  BLIP2FAST_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int key = first + key_of_column(half, g);
    if (key >= p.keys) continue;
    uint16_t* at =
        p.dkv + image * p.dkv_image + key * p.dkv_key + head * p.dkv_head + part * p.dkv_part;
    gradient.template store<Format>(at, half, p.dim);
  }
}

// gradient[16 keys, D] += scores[16 queries, 16 keys] transposed, times rows.
template <typename Format, int D>
BLIP2FAST_DEVICE void add_transposed(Accumulator<D>& gradient, const uint32_t (&scores)[4],
                                     const Rows& rows, int first_row) {
  loads_stay_below();
  uint32_t left[4];
  RightColumns<D> right;
  right.load_rows(rows, first_row);
  transpose(scores, left);
  gradient.template add<Format>(left, right);
}

// One warp: dq of 16 * M queries of a block and head. FUSED: block i alone reads image i and these
// are all its queries, so that dk and dv of a tile of keys are complete at once and everything is
// read once. Otherwise it leaves `delta` for the kernel below.
template <typename Format, int D, int M, bool FUSED>
BLIP2FAST_KERNEL(32 * kWarps, 2)
cross_attention_backward_queries_kernel(const CrossAttention p) {
  const int row_tiles = (p.queries + kTile * M - 1) / (kTile * M);
  const int64_t warp = block_index() * kWarps + thread_index() / 32;
  if (warp >= p.blocks * row_tiles * p.heads) return;
  const int head = static_cast<int>(warp % p.heads);
  const int first_row = static_cast<int>(warp / p.heads % row_tiles) * kTile * M;
  const int64_t block = warp / p.heads / row_tiles;
  const int64_t image = p.kv_index == nullptr ? block : p.kv_index[block];
  const int g = thread_index() % 32 / 4;

  const Rows query_rows = queries_of(p, block, head);
  const Rows dout_rows = rows_of(p, p.dout, block, head);
  const Rows key_rows = keys_of(p, image, head, 0), value_rows = keys_of(p, image, head, 1);
  const PhiloxKey philox = p.philox == nullptr ? PhiloxKey{} : philox_key(p.philox);

  RowStatistics statistics[M];
  Accumulator<D> dq[M];
  BLIP2FAST_UNROLL
  for (int m = 0; m < M; ++m) {
    const int row = first_row + kTile * m;
    LeftRows<D> out, dout;
    out.load(rows_of(p, p.out, block, head), row);
    dout.load(dout_rows, row);
    statistics[m].template compute_delta<Format>(dout, out);
    statistics[m].load_lse(p, block, head, row);
    dq[m].clear();
    BLIP2FAST_UNROLL
    for (int half = 0; half < 2 && !FUSED; ++half) {
      if (row + 8 * half + g < p.queries && thread_index() % 4 == 0) {
        p.delta[(block * p.queries + row + 8 * half + g) * p.heads + head] =
            statistics[m].delta[half];
      }
    }
  }

  for (int first = 0; first < p.keys; first += kTile) {
    if (first + kTile < p.keys) prefetch_keys(key_rows, value_rows, first + kTile);
    const unsigned visible = visible_keys(p, image, first);
    ScoreTile scores[M];
    BLIP2FAST_UNROLL
    for (int m = 0; m < M; ++m) {
      scores[m].template compute<Format, D>(p, philox, block, head, first_row + kTile * m, first,
                                            visible, statistics[m], query_rows, dout_rows, key_rows,
                                            value_rows);
    }
    loads_stay_below();
    {
      RightColumns<D> key_columns;
      key_columns.load_keys(key_rows, first);
      BLIP2FAST_UNROLL
      for (int m = 0; m < M; ++m) dq[m].template add<Format>(scores[m].gradient, key_columns);
    }
    if constexpr (FUSED) {
      Accumulator<D> gradient;  // dv, then dk: registers for one
      gradient.clear();
      BLIP2FAST_UNROLL
      for (int m = 0; m < M; ++m)
        add_transposed<Format>(gradient, scores[m].probability, dout_rows, first_row + kTile * m);
      gradient.scale(p.keep_scale, p.keep_scale);
      store_keys<Format>(p, gradient, image, head, first, 1);
      gradient.clear();
      BLIP2FAST_UNROLL
      for (int m = 0; m < M; ++m)
        add_transposed<Format>(gradient, scores[m].gradient, query_rows, first_row + kTile * m);
      gradient.scale(p.scale, p.scale);
      store_keys<Format>(p, gradient, image, head, first, 0);
    }
  }

  BLIP2FAST_UNROLL
  for (int m = 0; m < M; ++m) {
    dq[m].scale(p.scale, p.scale);
    BLIP2FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + kTile * m + 8 * half + g;
      if (row >= p.queries) continue;
      uint16_t* at = p.dq + block * p.dq_block + row * p.dq_query + head * p.dq_head;
      dq[m].template store<Format>(at, half, p.dim);
    }
  }
}

// One warp: dk and dv of 16 keys of an image and head, over the blocks that read it, in order.
template <typename Format, int D>
BLIP2FAST_KERNEL(32 * kWarps, 2)
cross_attention_backward_keys_kernel(const CrossAttention p) {
  const int key_tiles = (p.keys + kTile - 1) / kTile;
  const int64_t warp = block_index() * kWarps + thread_index() / 32;
  if (warp >= p.images * key_tiles * p.heads) return;
  const int head = static_cast<int>(warp % p.heads);
  const int first = static_cast<int>(warp / p.heads % key_tiles) * kTile;
  const int64_t image = warp / p.heads / key_tiles;

  const Rows key_rows = keys_of(p, image, head, 0), value_rows = keys_of(p, image, head, 1);
  const unsigned visible = visible_keys(p, image, first);
  const PhiloxKey philox = p.philox == nullptr ? PhiloxKey{} : philox_key(p.philox);
  Accumulator<D> dk, dv;
  dk.clear();
  dv.clear();
  const bool listed = p.order != nullptr;
  const int64_t use_end = listed ? p.offsets[image + 1] : image + 1;
  for (int64_t use = listed ? p.offsets[image] : image; use < use_end; ++use) {
    const int64_t block = listed ? p.order[use] : use;
    const Rows query_rows = queries_of(p, block, head);
    const Rows dout_rows = rows_of(p, p.dout, block, head);
    for (int row = 0; row < p.queries; row += kTile) {
      RowStatistics statistics;
      statistics.load_lse(p, block, head, row);
      statistics.load_delta(p, block, head, row);
      ScoreTile scores;
      scores.template compute<Format, D>(p, philox, block, head, row, first, visible, statistics,
                                         query_rows, dout_rows, key_rows, value_rows);
      add_transposed<Format>(dv, scores.probability, dout_rows, row);
      add_transposed<Format>(dk, scores.gradient, query_rows, row);
    }
  }
  dk.scale(p.scale, p.scale);
  dv.scale(p.keep_scale, p.keep_scale);
  store_keys<Format>(p, dk, image, head, first, 0);
  store_keys<Format>(p, dv, image, head, first, 1);
}

}  // namespace blip2fast
