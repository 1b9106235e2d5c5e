// What the kernels need of a warp: tensor-core products, exchanges between lanes, 16-bit formats.
//
// Kernels use these names only, so that the same source also compiles for the host, where
// tests/ops/emulated_device.h runs every thread of a block and checks the index arithmetic without
// a GPU (BLIP2FAST_EMULATED).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace blip2fast {

// A launch that failed: what it asked for, and why it did not get it.
inline std::runtime_error launch_error(const char* kernel, int64_t blocks, int threads,
                                       int shared_bytes, const std::string& why) {
  return std::runtime_error(std::string(kernel) + ": " + std::to_string(blocks) + " blocks of " +
                            std::to_string(threads) + " threads, " + std::to_string(shared_bytes) +
                            " bytes of shared memory each: " + why);
}

}  // namespace blip2fast

#ifdef BLIP2FAST_EMULATED
#include "emulated_device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define BLIP2FAST_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define BLIP2FAST_DEVICE __device__ __forceinline__
#define BLIP2FAST_UNROLL _Pragma("unroll")

namespace blip2fast {

struct Half {};
struct BFloat16 {};

BLIP2FAST_DEVICE int thread_index() {
  return threadIdx.x;
}
BLIP2FAST_DEVICE int64_t block_index() {
  return blockIdx.x;
}

template <typename Format>
BLIP2FAST_DEVICE uint32_t pack(float low, float high);
template <>
BLIP2FAST_DEVICE uint32_t pack<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
BLIP2FAST_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename Format>
BLIP2FAST_DEVICE float2 unpack(uint32_t pair);
template <>
BLIP2FAST_DEVICE float2 unpack<Half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
BLIP2FAST_DEVICE float2 unpack<BFloat16>(uint32_t pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

BLIP2FAST_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

BLIP2FAST_DEVICE void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

BLIP2FAST_DEVICE int shuffle_xor(int value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

// The compiler may not lift loads over this line, where it has no registers for them.
BLIP2FAST_DEVICE void loads_stay_below() {
  __syncwarp();
}

// Transpose an 8x8 matrix of 16-bit elements; lane 4r + c holds elements (r, 2c) and (r, 2c + 1).
BLIP2FAST_DEVICE uint32_t transpose_8x8(uint32_t pair) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// c[16, 8] += a[16, 16] b[16, 8]; fragments as PTX defines them for mma.m16n8k16.
template <typename Format>
BLIP2FAST_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
BLIP2FAST_DEVICE void mma<Half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
BLIP2FAST_DEVICE void mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Shared memory of the block, as many bytes as its launch gave.
BLIP2FAST_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char blip2fast_shared[];
  return blip2fast_shared;
}
BLIP2FAST_DEVICE void block_barrier() {
  __syncthreads();
}

BLIP2FAST_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copy 16 bytes to shared memory in the background; zeros, and no read, unless `valid`.
BLIP2FAST_DEVICE void copy16_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// Close a group of copies; wait until at most LATEST groups of this thread are under way.
BLIP2FAST_DEVICE void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int LATEST>
BLIP2FAST_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LATEST) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane 8i + r gives the address of row r of matrix i.
BLIP2FAST_DEVICE void load_matrices(uint32_t (&matrix)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(row))
               : "memory");
}
BLIP2FAST_DEVICE void load_matrices_transposed(uint32_t (&matrix)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(row))
               : "memory");
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return value;
}
// Of the current device: 10 * major + minor, how many blocks of a whole multiprocessor run at once,
// bytes of shared memory that a block may have.
inline int compute_capability() {
  return 10 * device_attribute(cudaDevAttrComputeCapabilityMajor) +
         device_attribute(cudaDevAttrComputeCapabilityMinor);
}
inline int multiprocessors() {
  return device_attribute(cudaDevAttrMultiProcessorCount);
}
inline int shared_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
}

template <typename Params>
void launch(const char* name, void (*kernel)(Params), int64_t blocks, int threads, void* stream,
            Params params, int shared_bytes = 0) {
  if (blocks == 0) return;
  if (blocks >= int64_t{1} << 31)
    throw launch_error(name, blocks, threads, shared_bytes, "too many blocks");
  const void* entry = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  void* arguments[] = {&params};
  if (error == cudaSuccess)
    error = cudaLaunchKernel(entry, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments,
                             shared_bytes, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess)
    throw launch_error(name, blocks, threads, shared_bytes, cudaGetErrorString(error));
}

}  // namespace blip2fast
#endif

namespace blip2fast {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Order of a maximum as PyTorch's: above all numbers is what is not one. False for two of those.
BLIP2FAST_DEVICE bool exceeds(float value, float best) {
  return !(value <= best) && best == best;
}
// Whether the first of two with an index each is the one to take: the lowest wins a tie.
BLIP2FAST_DEVICE bool wins(float a, int a_at, float b, int b_at) {
  return exceeds(a, b) || (!exceeds(b, a) && a_at < b_at);
}

struct alignas(16) Words4 {
  uint32_t word[4];
};
struct alignas(8) Words2 {
  uint32_t word[2];
};

// Over the four lanes that hold one row of an mma accumulator.
BLIP2FAST_DEVICE float quad_max(float value) {
  value = fmaxf(value, shuffle_xor(value, 1));
  return fmaxf(value, shuffle_xor(value, 2));
}
BLIP2FAST_DEVICE float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

}  // namespace blip2fast
