// The operator `launch`: tensors to what launcher.h takes. Part of bindings.cpp.
#pragma once

#include <string>
#include <vector>

#include "launcher.h"
#include "on_device.h"
#include "tensor_checks.h"

namespace gistkern {

// `description` is an int64 vector on the CPU (launcher.h says what it holds). `emulated`: a stub stands for the
// device, and takes CPU tensors.
inline void launch(Tensor description, std::vector<Tensor> tensors, bool emulated) {
  using namespace checks;
  require(description.is_cpu() && description.dim() == 1 && description.is_contiguous() &&
              description.scalar_type() == ScalarType::Long,
          "a launch's description must be an int64 vector on the CPU");
  require(!tensors.empty(), "a launch needs a tensor: its device is where the kernel runs");
  std::vector<LaunchTensor> given(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    require(emulated ? tensor.is_cpu() : tensor.is_cuda(), "tensor ", i, " of a launch must be on the GPU");
    require(emulated || tensor.get_device_index() == tensors[0].get_device_index(),
            "the tensors of a launch must be on one device");
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    given[i].data = tensor.data_ptr();
    given[i].type = static_cast<int32_t>(tensor.scalar_type());
    given[i].element_bytes = static_cast<int32_t>(tensor.element_size());
    given[i].sizes = sizes.data(), given[i].strides = strides.data(), given[i].dims = sizes.size();
  }
  const auto* numbers = static_cast<const int64_t*>(description.data_ptr());
  const auto run = [&](void* stream) {
    const LaunchDescription described{numbers, description.numel()};
    const std::string error = launch_described(&described, 1, given.data(), given.size(), stream);
    require(error.empty(), error);
  };
  if (emulated) return run(nullptr);
  const OnGpu device(tensors[0]);
  run(device.stream());
}

}  // namespace gistkern
