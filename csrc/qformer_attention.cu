#include "qformer_attention.h"
#include "qformer_attention_backward.h"
#include "qformer_attention_forward.h"

namespace blip2fast {
namespace {

int64_t ceil_divide(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

template <typename Kernel>
void launch_warps(const char* name, Kernel kernel, int64_t warps, const CrossAttention& p,
                  void* stream) {
  launch(name, kernel, ceil_divide(warps, kWarps), 32 * kWarps, stream, p);
}

// M tiles of 16 queries a warp share the keys that it reads; above D = 64 registers allow one.
template <typename Format, int D, int M>
void forward_with(const CrossAttention& p, void* stream) {
  const int64_t warps = p.blocks * ceil_divide(p.queries, kTile * M) * p.heads;
  launch_warps("cross_attention_forward_kernel", cross_attention_forward_kernel<Format, D, M>,
               warps, p, stream);
}

template <typename Format, int D, int M>
void backward_with(const CrossAttention& p, void* stream) {
  const int64_t warps = p.blocks * ceil_divide(p.queries, kTile * M) * p.heads;
  if constexpr (D <= 64) {
    if (cross_attention_fuses(p)) {
      launch_warps("cross_attention_backward_queries_kernel, fused",
                   cross_attention_backward_queries_kernel<Format, D, M, true>, warps, p, stream);
      return;
    }
  }
  launch_warps("cross_attention_backward_queries_kernel",
               cross_attention_backward_queries_kernel<Format, D, M, false>, warps, p, stream);
  const int64_t key_warps = p.images * ceil_divide(p.keys, kTile) * p.heads;
  launch_warps("cross_attention_backward_keys_kernel",
               cross_attention_backward_keys_kernel<Format, D>, key_warps, p, stream);
}

struct Forward {
  template <typename Format, int D, int M>
  static void run(const CrossAttention& p, void* stream) {
    forward_with<Format, D, M>(p, stream);
  }
};
struct Backward {
  template <typename Format, int D, int M>
  static void run(const CrossAttention& p, void* stream) {
    backward_with<Format, D, M>(p, stream);
  }
};

template <typename Pass, typename Format>
void dispatch_shape(const CrossAttention& p, void* stream) {
  const bool one_tile = p.queries <= kTile;
  if (p.dim <= 32) {
    one_tile ? Pass::template run<Format, 32, 1>(p, stream)
             : Pass::template run<Format, 32, 2>(p, stream);
  } else if (p.dim <= 64) {
    one_tile ? Pass::template run<Format, 64, 1>(p, stream)
             : Pass::template run<Format, 64, 2>(p, stream);
  } else {
    Pass::template run<Format, 128, 1>(p, stream);
  }
}

template <typename Pass>
void dispatch(const CrossAttention& p, Format16 format, void* stream) {
  format == Format16::kHalf ? dispatch_shape<Pass, Half>(p, stream)
                            : dispatch_shape<Pass, BFloat16>(p, stream);
}

}  // namespace

bool cross_attention_fuses(const CrossAttention& p) {
  return p.kv_index == nullptr && p.queries <= 2 * kTile && p.dim <= 64;
}

void cross_attention_forward(const CrossAttention& p, Format16 format, void* stream) {
  dispatch<Forward>(p, format, stream);
}

void cross_attention_backward(const CrossAttention& p, Format16 format, void* stream) {
  dispatch<Backward>(p, format, stream);
}

}  // namespace blip2fast
