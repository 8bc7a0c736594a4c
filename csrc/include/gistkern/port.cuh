// The only file that differs between nvcc and g++: what the kernels need of CUDA beyond the language.
//
// Under nvcc these are CUDA's own names and inline PTX for sm_80 and later; otherwise the emulator gives the same
// names.
#pragma once

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace gistkern {

// Dynamic shared memory of the block, the only shared memory that kernels use.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char block_memory[];
  return reinterpret_cast<T*>(block_memory);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 128 bits of global memory that no one writes while the kernel runs.
__device__ __forceinline__ uint4 load_128(const void* global) { return __ldg(static_cast<const uint4*>(global)); }

__device__ __forceinline__ void store_128(void* global, uint4 value) { *static_cast<uint4*>(global) = value; }

// 16 bytes past the registers and L1; those from valid_bytes on (0 or 16) become zeros and are not read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid_bytes)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups are unfinished.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8] in fp32.
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                          __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Bytes 0..3 of a and 4..7 of b, chosen by the four hexadecimal digits of `selector`, the lowest byte last.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// Counts an arrival and returns how many there were before it; the one after `others` makes the count 0 again. What
// happened before an arrival is visible after a later one, for the whole device.
__device__ __forceinline__ uint32_t arrive(uint32_t* count, uint32_t others) {
  uint32_t before;
  asm volatile("atom.inc.acq_rel.gpu.global.u32 %0, [%1], %2;\n" : "=r"(before) : "l"(count), "r"(others) : "memory");
  return before;
}

// For kernels that are launched by launch_early(): before a thread touches memory that an earlier launch of the stream
// may use. From there on all that they wrote is visible.
__device__ __forceinline__ void await_earlier_launches() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

}  // namespace gistkern

#include "gistkern/device.h"

namespace gistkern {

// Returns null, or the error as a static string.
template <typename... Parameters>
const char* launch_as(bool early, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                      void* stream, Parameters... arguments) {
  int device = 0;
  if (const char* error = current_device(device)) return error;
  if (const char* error = allow_shared(reinterpret_cast<const void*>(kernel), device, shared_bytes)) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = early && starts_early(device) ? 1 : 0;
  return why(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   const Arguments&... arguments) {
  return launch_as<Parameters...>(false, kernel, grid, block, shared_bytes, stream, arguments...);
}

// The same for a kernel that calls await_earlier_launches(): where the device can, its blocks start while those of the
// launch before it end.
template <typename... Parameters, typename... Arguments>
const char* launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                         const Arguments&... arguments) {
  return launch_as<Parameters...>(true, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace gistkern

#else

#include "emulator.h"

namespace gistkern {

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  }
  return result;
}

}  // namespace gistkern

#endif
