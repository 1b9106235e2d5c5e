// The library blip2fast/_C.so, through PyTorch's stable ABI: one binary for torch 2.10 and later
// and for every Python. Here is what every build has, dropout masks on the CPU; *_bindings.cpp add
// the operators of the kernels, which know nothing of torch.

#include "bindings.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "philox_cpu.h"

namespace blip2fast {
namespace {

Tensor philox_keep_mask(const Tensor& philox, const Tensor& rows, const Tensor& heads,
                        int64_t threshold, int64_t columns, int64_t first_column) {
  STD_TORCH_CHECK(rows.is_cpu(), "rows: expected on the CPU");
  STD_TORCH_CHECK(rows.dim() == 1 && heads.dim() == 1 && rows.size(0) == heads.size(0),
                  "rows and heads: expected one shape [n]");
  const auto key = philox_key(int64_list(philox, 2, rows, "philox"));
  const int64_t* row = int64_list(rows, rows.numel(), rows, "rows");
  const int64_t* head = int64_list(heads, rows.numel(), rows, "heads");
  STD_TORCH_CHECK(threshold >= 0 && threshold < (int64_t{1} << 32),
                  "threshold: expected 0 to 2^32 - 1, got ", threshold);
  STD_TORCH_CHECK(columns >= 0 && first_column >= 0, "columns: expected 0 or more");
  Tensor keep = torch::stable::new_empty(rows, {rows.size(0), columns}, ScalarType::Bool);
  bool* out = keep.mutable_data_ptr<bool>();
  // a thread is worth starting for about 16,000 elements
  const int64_t grain = std::max<int64_t>(16384 / std::max<int64_t>(columns, 1), 1);
  torch::stable::parallel_for(0, rows.size(0), grain, [&](int64_t begin, int64_t end) {
    philox_keep_rows(key, row + begin, head + begin, end - begin, columns, first_column,
                     static_cast<uint32_t>(threshold), out + begin * columns);
  });
  return keep;
}

}  // namespace

// What was compiled, by name (compilers.py): records of checks hold for builds of the same code.
#define BLIP2FAST_QUOTED(x) #x
#define BLIP2FAST_STRING(x) BLIP2FAST_QUOTED(x)
extern "C" __attribute__((visibility("default"))) const char* blip2fast_code() {
  return BLIP2FAST_STRING(BLIP2FAST_CODE);
}

BLIP2FAST_LIBRARY(m) {
  m.def(
      "philox_keep_mask(Tensor philox, Tensor rows, Tensor heads, int threshold, int columns, "
      "int first_column) -> Tensor");
}

BLIP2FAST_ON_HOST(m) {
  m.impl("philox_keep_mask", TORCH_BOX(&philox_keep_mask));
}

}  // namespace blip2fast
