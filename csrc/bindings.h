// What the operators of blip2fast/_C.so have in common: the library that they register in, and
// checks of their arguments. Checks for users are in blip2fast/ops/; these keep a direct call from
// reading out of bounds.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <string>

#include "format16.h"

// A library is defined once, by bindings.cpp; other files add fragments, in any order.
#ifdef BLIP2FAST_EMULATED
// the kernels on the host, for tests/ops/test_emulated_*.py
#define BLIP2FAST_LIBRARY(m) STABLE_TORCH_LIBRARY(blip2fast_emulated, m)
#define BLIP2FAST_FRAGMENT(m) STABLE_TORCH_LIBRARY_FRAGMENT(blip2fast_emulated, m)
#define BLIP2FAST_ON_HOST(m) STABLE_TORCH_LIBRARY_IMPL(blip2fast_emulated, CPU, m)
#define BLIP2FAST_ON_DEVICE(m) STABLE_TORCH_LIBRARY_IMPL(blip2fast_emulated, CPU, m)
#else
#define BLIP2FAST_LIBRARY(m) STABLE_TORCH_LIBRARY(blip2fast_C, m)
#define BLIP2FAST_FRAGMENT(m) STABLE_TORCH_LIBRARY_FRAGMENT(blip2fast_C, m)
#define BLIP2FAST_ON_HOST(m) STABLE_TORCH_LIBRARY_IMPL(blip2fast_C, CPU, m)
#define BLIP2FAST_ON_DEVICE(m) STABLE_TORCH_LIBRARY_IMPL(blip2fast_C, CUDA, m)
#endif

#ifndef BLIP2FAST_EMULATED
// in torch's CUDA library, which a CPU build of torch does not have
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace blip2fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A kernel takes every address for one of its own device's.
inline void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() == like.is_cpu() && tensor.is_cuda() == like.is_cuda() &&
                      tensor.get_device_index() == like.get_device_index(),
                  name, ": expected on the device of the data");
}

inline std::string describe(const std::initializer_list<int64_t>& shape) {
  std::string text;
  for (const int64_t size : shape) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "[" + text + "]";
}
inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape,
                        const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i)
    same = tensor.size(static_cast<int64_t>(i)) == shape.begin()[i];
  STD_TORCH_CHECK(same, name, ": expected ", describe(shape));
}

// Contiguous, of one type, with `length` elements in all.
inline void check_list(const Tensor& tensor, ScalarType type, const char* type_name, int64_t length,
                       const Tensor& like, const char* name) {
  check_device(tensor, like, name);
  STD_TORCH_CHECK(
      tensor.scalar_type() == type && tensor.is_contiguous() && tensor.numel() == length, name,
      ": expected contiguous ", type_name, ", ", length, " elements, got ", tensor.numel());
}
inline const int64_t* int64_list(const Tensor& tensor, int64_t length, const Tensor& like,
                                 const char* name) {
  check_list(tensor, ScalarType::Long, "int64", length, like, name);
  return tensor.const_data_ptr<int64_t>();
}

// The current stream of a tensor's device, which is the current device meanwhile.
class Launching {
 public:
#ifndef BLIP2FAST_EMULATED
  explicit Launching(const Tensor& on) : guard_(index_of(on)) {
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
#ifndef BLIP2FAST_EMULATED
  static torch::stable::accelerator::DeviceIndex index_of(const Tensor& on) {
    STD_TORCH_CHECK(on.is_cuda(), "expected data on a CUDA device");
    return on.get_device_index();
  }
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

inline Format16 format_of(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16,
                  "expected float16 or bfloat16");
  return type == ScalarType::Half ? Format16::kHalf : Format16::kBFloat16;
}

// Rows are read and written 16 bytes at a time.
inline void check_rows(const Tensor& tensor, const char* name, const Tensor& like, int64_t dims) {
  check_device(tensor, like, name);
  STD_TORCH_CHECK(tensor.dim() == dims && tensor.scalar_type() == like.scalar_type(), name,
                  ": expected ", dims, " dimensions and the dtype of the data");
  STD_TORCH_CHECK(tensor.stride(dims - 1) == 1, name, ": expected a contiguous last dimension");
  bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < dims; ++i)
    aligned &= tensor.size(i) <= 1 || tensor.stride(i) % 8 == 0;
  STD_TORCH_CHECK(aligned, name, ": expected rows that start at multiples of 16 bytes");
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

}  // namespace blip2fast
