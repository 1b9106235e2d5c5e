// Dropout masks on the CPU.
#pragma once

#include <cstdint>

#include "philox.h"

namespace blip2fast {

// keep[i, j] = word of column first_column + j of (rows[i], heads[i]) >= threshold.
// keep: [count, columns]; threshold: 0 to 2^32 - 1.
void philox_keep_rows(const PhiloxKey& key, const int64_t* rows, const int64_t* heads,
                      int64_t count, int64_t columns, int64_t first_column, uint32_t threshold,
                      bool* keep);

}  // namespace blip2fast
