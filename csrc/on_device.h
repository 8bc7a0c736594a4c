// Where a launch runs: the device of a tensor and its current stream. Part of bindings.cpp.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "dynamic_loading.h"
#include "tensor_checks.h"

namespace gistkern {

using torch::stable::Tensor;

// The stable ABI of torch 2.10 tells no CUDA stream, only the library of torch's CUDA operators does. It is loaded
// already where a tensor is on a GPU; linking against it would keep this library from loading beside a CPU build of
// torch.
inline void* current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  void* stream = nullptr;
  checks::require(get != nullptr && get(device, &stream) == 0, "torch does not tell its current CUDA stream");
  return stream;
}

// A GPU made current, and its current stream.
class OnGpu {
 public:
  explicit OnGpu(int32_t device) : guard_(device), stream_(current_stream(device)) {}
  explicit OnGpu(const Tensor& tensor) : OnGpu(tensor.get_device_index()) {}
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};

#if defined(GISTKERN_WITH_CUDA) && !defined(GISTKERN_EMULATED)
using OnDevice = OnGpu;
inline bool runs_on_gpu(const Tensor& tensor) { return tensor.is_cuda(); }
#elif defined(GISTKERN_EMULATED)
// The emulator runs the CUDA kernels on CPU tensors.
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
};
inline bool runs_on_gpu(const Tensor&) { return true; }
#endif

}  // namespace gistkern
