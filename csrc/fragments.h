// Operands of mma.m16n8k16 straight from global memory, in 16-byte loads and without shared memory.
//
// A product's inner index may be permuted if both operands agree, and its outer ones if the reader
// of the result knows. Lane 4g + t therefore takes consecutive elements where PTX's layout would
// make it take strided ones:
//   rows operand (inner index d): of row g it holds d = 32j + 8t .. 32j + 8t + 7, two steps of 16;
//   columns operand (inner index the row): D/8 elements from d = g D/8, one for each tile of 8;
//   accumulator of D/8 such tiles: of rows g and g + 8 it holds d = t D/4 .. (t + 1) D/4 - 1.
// Keys of a tile of 16 are permuted too, so that lane t's scores are those of keys 4t .. 4t + 3:
// the four that one Philox counter serves.
#pragma once

#include "device.h"

namespace blip2fast {

constexpr int kTile = 16;  // rows, or keys, of one mma step

// The key within its tile that column `n` (0 to 7) of accumulator tile `half` (0 or 1) stands for.
BLIP2FAST_DEVICE int key_of_column(int half, int n) {
  return 4 * (n / 2) + 2 * half + n % 2;
}

// Rows of `dim` 16-bit elements, `stride` elements apart; outside `count` rows and `dim` is 0.
// Offsets from `data`, which is 64 bits wide, fit 32 bits: count * stride is below 2^31.
struct Rows {
  const uint16_t* data;
  int stride;
  int count, dim;

  BLIP2FAST_DEVICE Words4 load8(int row, int d) const {
    if (row >= count || d >= dim) return Words4{};
    return *reinterpret_cast<const Words4*>(data + row * stride + d);
  }
  BLIP2FAST_DEVICE Words2 load4(int row, int d) const {
    if (row >= count || d >= dim) return Words2{};
    return *reinterpret_cast<const Words2*>(data + row * stride + d);
  }
};

// Left operand [16 rows, D], inner index d.
template <int D>
struct LeftRows {
  uint32_t step[D / 16][4];

  BLIP2FAST_DEVICE void load(const Rows& rows, int first) {
    const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
    BLIP2FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      BLIP2FAST_UNROLL
      for (int j = 0; j < D / 32; ++j) {
        const Words4 words = rows.load8(first + g + 8 * half, 32 * j + 8 * t);
        step[2 * j][half] = words.word[0];
        step[2 * j][half + 2] = words.word[1];
        step[2 * j + 1][half] = words.word[2];
        step[2 * j + 1][half + 2] = words.word[3];
      }
    }
  }
};

// Right operand [D, 16 keys], inner index d, two accumulator tiles.
template <int D>
struct RightKeys {
  uint32_t step[D / 16][2][2];

  BLIP2FAST_DEVICE void load(const Rows& rows, int first) {
    const int lane = thread_index() % 32, g = lane / 4, t = lane % 4;
    BLIP2FAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      BLIP2FAST_UNROLL
      for (int j = 0; j < D / 32; ++j) {
        const Words4 words = rows.load8(first + key_of_column(half, g), 32 * j + 8 * t);
        step[2 * j][half][0] = words.word[0];
        step[2 * j][half][1] = words.word[1];
        step[2 * j + 1][half][0] = words.word[2];
        step[2 * j + 1][half][1] = words.word[3];
      }
    }
  }
};

// Right operand [16 rows, D], inner index the row, D/8 accumulator tiles.
template <int D>
struct RightColumns {
  uint32_t tile[D / 8][2];

  // Rows in the order of an accumulator's columns: lane t takes keys 4t .. 4t + 3.
  BLIP2FAST_DEVICE void load_keys(const Rows& rows, int first) {
    const int t = thread_index() % 4;
    load(rows, {first + 4 * t, first + 4 * t + 1, first + 4 * t + 2, first + 4 * t + 3});
  }
  // Rows in order: lane t takes rows 2t, 2t + 1, 2t + 8, 2t + 9.
  BLIP2FAST_DEVICE void load_rows(const Rows& rows, int first) {
    const int t = thread_index() % 4;
    load(rows, {first + 2 * t, first + 2 * t + 1, first + 2 * t + 8, first + 2 * t + 9});
  }

 private:
  struct Four {
    int row[4];
  };

  BLIP2FAST_DEVICE void load(const Rows& rows, Four four) {
    const int g = thread_index() % 32 / 4;
    constexpr int kChunk = D / 8;
    uint32_t words[4][kChunk / 2];
    BLIP2FAST_UNROLL
    for (int r = 0; r < 4; ++r) {
      if constexpr (kChunk == 4) {
        const Words2 pair = rows.load4(four.row[r], kChunk * g);
        words[r][0] = pair.word[0];
        words[r][1] = pair.word[1];
      } else {
        BLIP2FAST_UNROLL
        for (int part = 0; part < kChunk / 8; ++part) {
          const Words4 eight = rows.load8(four.row[r], kChunk * g + 8 * part);
          BLIP2FAST_UNROLL
          for (int w = 0; w < 4; ++w) words[r][4 * part + w] = eight.word[w];
        }
      }
    }
    BLIP2FAST_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      BLIP2FAST_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint32_t first = words[2 * half][i / 2], second = words[2 * half + 1][i / 2];
        tile[i][half] =
            i % 2 ? (first >> 16) | (second & 0xFFFF0000u) : (first & 0xFFFFu) | (second << 16);
      }
    }
  }
};

// Accumulator [16 rows, D] of products with RightColumns.
template <int D>
struct Accumulator {
  float tile[D / 8][4];

  BLIP2FAST_DEVICE void clear() {
    BLIP2FAST_UNROLL
    for (int i = 0; i < D / 8; ++i) {
      BLIP2FAST_UNROLL
      for (int e = 0; e < 4; ++e) tile[i][e] = 0.0f;
    }
  }
  template <typename Format>
  BLIP2FAST_DEVICE void add(const uint32_t (&left)[4], const RightColumns<D>& right) {
    BLIP2FAST_UNROLL
    for (int i = 0; i < D / 8; ++i) mma<Format>(tile[i], left, right.tile[i]);
  }
  // Scale rows g and g + 8.
  BLIP2FAST_DEVICE void scale(float upper, float lower) {
    BLIP2FAST_UNROLL
    for (int i = 0; i < D / 8; ++i) {
      tile[i][0] *= upper;
      tile[i][1] *= upper;
      tile[i][2] *= lower;
      tile[i][3] *= lower;
    }
  }
  // Write this lane's part of row g (half 0) or g + 8 (half 1) to `row`.
  template <typename Format>
  BLIP2FAST_DEVICE void store(uint16_t* row, int half, int dim) const {
    const int t = thread_index() % 4;
    constexpr int kChunk = D / 8;
    BLIP2FAST_UNROLL
    for (int part = 0; part < D / 32; ++part) {
      const int d = D / 4 * t + 8 * part;
      Words4 words;
      BLIP2FAST_UNROLL
      for (int w = 0; w < 4; ++w) {
        // element e of the lane's D/4: of the even tile column first, then of the odd one
        const int e = 8 * part + 2 * w;
        words.word[w] = pack<Format>(tile[e % kChunk][2 * half + e / kChunk],
                                     tile[(e + 1) % kChunk][2 * half + (e + 1) / kChunk]);
      }
      if (d < dim) *reinterpret_cast<Words4*>(row + d) = words;
    }
  }
};

}  // namespace blip2fast
