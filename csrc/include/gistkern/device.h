// What launches ask of the CUDA runtime, each at most once a device or kernel where that is enough. Part of port.cuh.
#pragma once

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

namespace gistkern {

// Null, or the error as a static string. A launch that was refused is reported once, by us.
inline const char* why(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Lets a kernel have this much dynamic shared memory.
inline const char* allow_shared(const void* kernel, int device, size_t bytes) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (bytes <= kWithoutAsking) return nullptr;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return nullptr;
  auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (const char* error = why(cudaFuncSetAttribute(kernel, attribute, static_cast<int>(bytes)))) return error;
  most = bytes;
  return nullptr;
}

// Whether a launch may start while the one before it ends (compute capability 9.0 on).
inline bool starts_early(int device) {
  static std::mutex mutex;
  static std::map<int, bool> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(device);
  if (found == known.end()) {
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    found = known.emplace(device, major >= 9).first;
  }
  return found->second;
}

inline const char* current_device(int& device) { return why(cudaGetDevice(&device)); }

// Whether a stream's calls are recorded into a graph, and otherwise a number that is the stream's alone as long as the
// process lives.
inline const char* describe_stream(void* stream, unsigned long long& id, bool& captured) {
  auto handle = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (const char* error = why(cudaStreamIsCapturing(handle, &status))) return error;
  captured = status != cudaStreamCaptureStatusNone;
  return captured ? nullptr : why(cudaStreamGetId(handle, &id));
}

// Zeroed memory of the current device, never freed. Also while a stream is captured: by a stream of its own.
inline const char* allocate_zeros(size_t bytes, void** memory) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  if (const char* error = why(cudaThreadExchangeStreamCaptureMode(&mode))) return error;
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaMalloc(memory, bytes);
  if (error == cudaSuccess) error = cudaMemsetAsync(*memory, 0, bytes, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (stream != nullptr) cudaStreamDestroy(stream);
  cudaThreadExchangeStreamCaptureMode(&mode);
  return why(error);
}

}  // namespace gistkern
