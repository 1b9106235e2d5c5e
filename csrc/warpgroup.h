// What kernels for Hopper need of a group of four warps: products of matrices that lie in shared
// memory, on the tensor cores while the warps go on (wgmma, sm_90a alone), and barriers of a part
// of the block. tests/ops/emulated_warpgroup.h is the same for the host.
#pragma once

#include "device.h"

namespace blip2fast {

constexpr int kWarpgroup = 128;

// 16-bit rows of 128 bytes one after the other, 16-byte piece p of row r in the place of piece
// p ^ (r % 8): the 128-byte swizzle, which repeats every 8 rows.
constexpr int kSwizzleRow = 128;
constexpr int kSwizzleBytes = 8 * kSwizzleRow;

}  // namespace blip2fast

#ifdef BLIP2FAST_EMULATED
#include "emulated_warpgroup.h"
#else

#define BLIP2FAST_8(i)                                                                        \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define BLIP2FAST_64(i)                                                         \
  BLIP2FAST_8(i), BLIP2FAST_8(i + 8), BLIP2FAST_8(i + 16), BLIP2FAST_8(i + 24), \
      BLIP2FAST_8(i + 32), BLIP2FAST_8(i + 40), BLIP2FAST_8(i + 48), BLIP2FAST_8(i + 56)
#define BLIP2FAST_C BLIP2FAST_64(0), BLIP2FAST_64(64)
#define BLIP2FAST_C_NAMES                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, "                 \
  "%8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, "         \
  "%24, %25, %26, %27, %28, %29, %30, %31, "         \
  "%32, %33, %34, %35, %36, %37, %38, %39, "         \
  "%40, %41, %42, %43, %44, %45, %46, %47, "         \
  "%48, %49, %50, %51, %52, %53, %54, %55, "         \
  "%56, %57, %58, %59, %60, %61, %62, %63, "         \
  "%64, %65, %66, %67, %68, %69, %70, %71, "         \
  "%72, %73, %74, %75, %76, %77, %78, %79, "         \
  "%80, %81, %82, %83, %84, %85, %86, %87, "         \
  "%88, %89, %90, %91, %92, %93, %94, %95, "         \
  "%96, %97, %98, %99, %100, %101, %102, %103, "     \
  "%104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
// from here on operands are %128 and up
#define BLIP2FAST_WGMMA(type, condition, rest)                                                   \
  "{\n.reg .pred add;\nsetp.ne.b32 add, " condition                                              \
  ", 0;\n"                                                                                       \
  "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" BLIP2FAST_C_NAMES "}, " rest \
  ";\n}"
#define BLIP2FAST_MULTIPLY(type)                                            \
  asm volatile(BLIP2FAST_WGMMA(type, "%130", "%128, %129, add, 1, 1, 0, 0") \
               : BLIP2FAST_C                                                \
               : "l"(a), "l"(b), "r"(add ? 1 : 0))
#define BLIP2FAST_MULTIPLY_REGISTERS(type)                                                \
  asm volatile(BLIP2FAST_WGMMA(type, "1", "{%128, %129, %130, %131}, %132, add, 1, 1, 1") \
               : BLIP2FAST_C                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

namespace blip2fast {

// c[64, 256] = (add ? c : 0) + a[64, 16] b[256, 16]^T by the warpgroup, in the background: c may
// not be read or written until finish_products. Warp w has rows 16 w ..; lane 4g + t has element
// c[4n + 2h + e] in row g + 8h and column 8n + 2t + e.
template <typename Format>
BLIP2FAST_DEVICE void multiply_async(float (&c)[128], uint64_t a, uint64_t b, bool add);
template <>
BLIP2FAST_DEVICE void multiply_async<Half>(float (&c)[128], uint64_t a, uint64_t b, bool add) {
  BLIP2FAST_MULTIPLY("f16");
}
template <>
BLIP2FAST_DEVICE void multiply_async<BFloat16>(float (&c)[128], uint64_t a, uint64_t b, bool add) {
  BLIP2FAST_MULTIPLY("bf16");
}

// c[64, 256] += a[64, 16] b[16, 256], likewise. Warp w has rows 16 w .. of `a`; lane 4g + t has
// elements k = 2t + 8 (i / 2) and k + 1 of row g + 8 (i % 2) in a[i], which stays as it is until
// the product was waited for.
template <typename Format>
BLIP2FAST_DEVICE void multiply_registers_async(float (&c)[128], const uint32_t (&a)[4], uint64_t b);
template <>
BLIP2FAST_DEVICE void multiply_registers_async<Half>(float (&c)[128], const uint32_t (&a)[4],
                                                     uint64_t b) {
  BLIP2FAST_MULTIPLY_REGISTERS("f16");
}
template <>
BLIP2FAST_DEVICE void multiply_registers_async<BFloat16>(float (&c)[128], const uint32_t (&a)[4],
                                                         uint64_t b) {
  BLIP2FAST_MULTIPLY_REGISTERS("bf16");
}

// Before the first product, and where accumulators were touched since the last.
BLIP2FAST_DEVICE void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Close a group of products; wait until at most LATEST groups are under way.
BLIP2FAST_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LATEST>
BLIP2FAST_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATEST) : "memory");
}
// Wait for all; the compiler may read the accumulators only after this.
BLIP2FAST_DEVICE void finish_products(float (&c)[128]) {
  wait_products<0>();
  asm volatile("" : BLIP2FAST_C::"memory");
}

// Copies that this thread has waited for are there for products too, after a barrier.
BLIP2FAST_DEVICE void publish_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Barrier `id` (1 to 15; 0 is block_barrier's) of `threads` threads, whole warps: count and wait,
// or count only.
BLIP2FAST_DEVICE void barrier_wait(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
BLIP2FAST_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace blip2fast

#undef BLIP2FAST_MULTIPLY_REGISTERS
#undef BLIP2FAST_MULTIPLY
#undef BLIP2FAST_WGMMA
#undef BLIP2FAST_C_NAMES
#undef BLIP2FAST_C
#undef BLIP2FAST_64
#undef BLIP2FAST_8
#endif

namespace blip2fast {

// Descriptors of matrices in the swizzle that begin at `shared`, where its pattern begins.
constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
constexpr uint64_t kNextEightRows = uint64_t{kSwizzleBytes / 16} << 32;

// A row is the inner index, up to 64 elements; + 2 advances by 16 of them.
BLIP2FAST_DEVICE uint64_t matrix_descriptor(const void* shared) {
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kNextEightRows | kUnused | (shared_address(shared) & 0x3FFFF) >> 4;
}
// Rows are the inner index; a row's next 64 elements lie `next_columns` bytes further.
BLIP2FAST_DEVICE uint64_t transposed_descriptor(const void* shared, int next_columns) {
  return kSwizzle128 | kNextEightRows | static_cast<uint64_t>(next_columns / 16) << 16 |
         (shared_address(shared) & 0x3FFFF) >> 4;
}

}  // namespace blip2fast
