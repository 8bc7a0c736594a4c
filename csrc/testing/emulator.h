// CUDA on the CPU for tests: the names of port.cuh, one fiber per CUDA thread. See emulator/ for how they work.
//
// Blocks run one after another and the threads of a block in turns, both in an order drawn from the environment
// variable GISTKERN_EMULATOR_SEED. Shared memory starts as NaN in every block. What the hardware would answer with
// undefined behavior ends the process with a message (or the launch, see emulator_return_errors).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

// NVIDIA's host headers define the other qualifiers as nothing
#define __launch_bounds__(...)

#define threadIdx (::gistkern::emulator::running->thread)
#define blockIdx (::gistkern::emulator::running->block)
#define blockDim (::gistkern::emulator::running->block_dimensions)
#define gridDim (::gistkern::emulator::running->grid_dimensions)

using cudaStream_t = struct CUstream_st*;

namespace gistkern {
namespace emulator {

struct Indices {
  uint3 thread, block;
  dim3 block_dimensions, grid_dimensions;
};

// Of the thread that runs now.
extern const Indices* running;

// What the threads of a block or the lanes of a warp do together.
enum class Meeting : int {
  kSyncThreads,
  kSyncWarp,
  kShuffle,
  kShuffleXor,
  kShuffleDown,
  kBallot,
  kLoadMatrix,
  kLoadMatrixTransposed,
  kMmaFloat16,
  kMmaBFloat16,
};

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
bool sync_threads(bool predicate);  // whether any thread's is true
void sync_warp(uint32_t mask);
uint32_t shuffle(Meeting meeting, uint32_t mask, uint32_t value, uint32_t operand);
uint32_t ballot(uint32_t mask, bool predicate);
void load_matrix(Meeting meeting, uint32_t (&matrices)[4], const void* row);
void mma(Meeting meeting, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void* shared_memory();
void copy_async(void* shared_destination, const void* source, int valid_bytes);
void copy_async_commit();
void copy_async_wait(int groups_in_flight);
void await_earlier_launches();
void touch(const char* name, int64_t bytes);
uint32_t arrive(uint32_t* count, uint32_t others);
const char* run(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* arguments,
                bool early);

template <typename T>
T shuffle_value(Meeting meeting, uint32_t mask, T value, uint32_t operand) {
  static_assert(sizeof(T) == 4, "only 4-byte values are shuffled");
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = shuffle(meeting, mask, bits, operand);
  std::memcpy(&value, &bits, 4);
  return value;
}

template <typename Pointer>
Pointer aligned_128(const char* name, Pointer pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) fail("%s: address %p is not 16-byte aligned", name, pointer);
  return pointer;
}

}  // namespace emulator

template <typename T>
T* shared_memory() {
  return static_cast<T*>(emulator::shared_memory());
}

inline uint4 load_128(const void* source) {
  uint4 value;
  emulator::touch("load_128", sizeof(value));
  std::memcpy(&value, emulator::aligned_128("load_128", source), sizeof(value));
  return value;
}

inline void store_128(void* destination, uint4 value) {
  std::memcpy(emulator::aligned_128("store_128", destination), &value, sizeof(value));
}

inline void copy_async_16(void* shared_destination, const void* source, int valid_bytes) {
  emulator::copy_async(shared_destination, source, valid_bytes);
}

inline void copy_async_commit() { emulator::copy_async_commit(); }

template <int N>
void copy_async_wait() {
  emulator::copy_async_wait(N);
}

inline void load_matrix_x4(uint32_t (&matrices)[4], const void* shared_row) {
  emulator::load_matrix(emulator::Meeting::kLoadMatrix, matrices, shared_row);
}

inline void load_matrix_x4_trans(uint32_t (&matrices)[4], const void* shared_row) {
  emulator::load_matrix(emulator::Meeting::kLoadMatrixTransposed, matrices, shared_row);
}

template <typename Tag>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Tag) {
  static_assert(std::is_same_v<Tag, __half> || std::is_same_v<Tag, __nv_bfloat16>);
  constexpr bool kHalf = std::is_same_v<Tag, __half>;
  emulator::mma(kHalf ? emulator::Meeting::kMmaFloat16 : emulator::Meeting::kMmaBFloat16, d, a, b);
}

inline uint32_t arrive(uint32_t* count, uint32_t others) { return emulator::arrive(count, others); }
inline void await_earlier_launches() { emulator::await_earlier_launches(); }

inline float exp2_fast(float x) { return std::exp2(x); }
inline float log2_fast(float x) { return std::log2(x); }

// Runs the kernel to its end. Null, or the message of what a real launch would refuse.
template <typename... Parameters, typename... Arguments>
const char* launch_as(bool early, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                      Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> arguments;
  };
  const Call call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto body = [](const void* opaque) {
    const Call& call = *static_cast<const Call*>(opaque);
    std::apply(call.kernel, call.arguments);
  };
  return emulator::run(grid, block, shared_bytes, body, &call, early);
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/,
                   Arguments&&... arguments) {
  return launch_as(false, kernel, grid, block, shared_bytes, std::forward<Arguments>(arguments)...);
}

// Every thread of such a launch has to await_earlier_launches() before it touches memory.
template <typename... Parameters, typename... Arguments>
const char* launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/,
                         Arguments&&... arguments) {
  return launch_as(true, kernel, grid, block, shared_bytes, std::forward<Arguments>(arguments)...);
}

// One device, whose streams are any numbers; emulator_capture() says whether calls are recorded into a graph.
inline const char* current_device(int& device) { return device = 0, nullptr; }
const char* describe_stream(void* stream, unsigned long long& id, bool& captured);
const char* allocate_zeros(size_t bytes, void** memory);
extern "C" __attribute__((visibility("default"))) void emulator_capture(bool enabled);

// For tests. From here on an error is returned by launch() (true) or aborts the process (false, the default).
extern "C" __attribute__((visibility("default"))) void emulator_return_errors(bool enabled);

// Extra passes over the shared-memory banks that ldmatrix needed so far in this process.
extern "C" __attribute__((visibility("default"))) int64_t emulator_bank_conflicts();

// Of this process: launches, barriers (of blocks), arrivals, and bytes by load_128 and copy_async_16 from global
// memory.
struct EmulatorCounts {
  int64_t launches, barriers, arrivals, bytes;
};
extern "C" __attribute__((visibility("default"))) EmulatorCounts emulator_counts();

}  // namespace gistkern

inline void __syncthreads() { gistkern::emulator::sync_threads(false); }
inline int __syncthreads_or(int predicate) { return gistkern::emulator::sync_threads(predicate != 0); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) { gistkern::emulator::sync_warp(mask); }

template <typename T>
T __shfl_sync(uint32_t mask, T value, int lane) {
  return gistkern::emulator::shuffle_value(gistkern::emulator::Meeting::kShuffle, mask, value, lane);
}

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
  return gistkern::emulator::shuffle_value(gistkern::emulator::Meeting::kShuffleXor, mask, value, lane_mask);
}

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta) {
  return gistkern::emulator::shuffle_value(gistkern::emulator::Meeting::kShuffleDown, mask, value, delta);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate) { return gistkern::emulator::ballot(mask, predicate != 0); }
