// All pairs of images and texts: greatest similarity over an image's queries, statistics of rows
// and columns, gradients. kernels/itc/README.md has the maths and the meaning of every tensor.
#pragma once

#include <cstdint>

#include "format16.h"

namespace blip2fast {

constexpr int kItcQueries = 32;      // queries of an image, at most; fewer are padded
constexpr int kItcWidth = 256;       // feature width, at most; a multiple of 8
constexpr int kItcStatistics = 6;    // of a row or column: kernels/itc/interface.py
constexpr int kItcMaxSegments = 32;  // parts of a column whose statistics are joined

// One chunk of rows. Strides in elements; features are contiguous.
struct ItcSweep {
  const uint16_t* image;  // [M, Q, D]
  int64_t image_row, image_query;
  const uint16_t* text;  // [N, D]
  int64_t text_row;
  int64_t images, texts;  // M, N
  int queries, dim;
  const float* temp;
  const int64_t *row_ids, *column_ids;  // or null, both
  int64_t first_row;
  const int64_t* philox;  // or null: no negatives

  int64_t begin, end;  // the chunk: images begin .. end - 1
  float* sim;          // [end - begin, N]
  uint8_t* arg;        // [end - begin, N]

  float* rows;            // [6, M]
  int64_t* row_index;     // [2, M]
  int64_t segment_rows;   // a multiple of it begins a chunk
  float* parts;           // [segments, 6, N]
  int32_t* part_index;    // [segments, 2, N]
  float* columns;         // [6, N]
  int64_t* column_index;  // [2, N]

  // gradient
  const float *row_lse, *row_weight;        // [M], [3, M]
  const float *column_lse, *column_weight;  // [N], [3, N]
  bool local;
  float* scale;         // [2]: of pairs' gradients before they are 16 bits, and its inverse
  uint16_t* d_image;    // [M, Q, D] contiguous
  int text_splits;      // parts of the images whose d_text are added up in order
  float* d_text_parts;  // [text_splits, N, D]
  uint16_t* d_text;     // [N, D] contiguous
  float* d_temp_parts;  // [ceil(M / 4)]
  float* d_temp;
};

// Rows of a segment; parts for d_text on the current device.
int64_t itc_segment_rows(int64_t images);
int itc_text_splits(int64_t images, int64_t texts);

// Into how many parts, at most `most`, to cut the `steps` of each of `blocks` blocks that have a
// multiprocessor to themselves: waves of blocks, each as long as a part and what a block costs
// besides, in steps.
inline int64_t quickest_splits(int64_t blocks, int64_t steps, int64_t besides, int64_t most,
                               int64_t multiprocessors) {
  int64_t best = 1, least = -1;
  for (int64_t splits = 1; splits == 1 || (splits <= most && splits <= 256); ++splits) {
    const int64_t waves = (blocks * splits + multiprocessors - 1) / multiprocessors;
    const int64_t time = waves * ((steps + splits - 1) / splits + besides);
    if (least < 0 || time < least) {
      best = splits;
      least = time;
    }
  }
  return best;
}

// Each on a cudaStream_t; raise std::runtime_error where a launch fails.
void itc_similarity(const ItcSweep& p, Format16 format, void* stream);
void itc_statistics(const ItcSweep& p, void* stream);
void itc_join_columns(const ItcSweep& p, void* stream);
void itc_gradient_scale(const ItcSweep& p, void* stream);  // before the first gradient
void itc_gradient(const ItcSweep& p, Format16 format, void* stream);
void itc_join_gradient(const ItcSweep& p, Format16 format, void* stream);
// What similarity and gradient call on compute capability 9.0.
void itc_similarity_sm90(const ItcSweep& p, Format16 format, void* stream);
void itc_gradient_sm90(const ItcSweep& p, Format16 format, void* stream);

}  // namespace blip2fast
