// Launching a kernel that the CUDA driver has loaded already, by its handle: Triton's kernels without Triton's Python.
// Tensor maps (what TMA copies through) are encoded here, at every launch, from tensors and a description that Python
// made once (gistkern/backends/launcher.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace gistkern {

// A tensor of a call. The type is torch's ScalarType.
struct LaunchTensor {
  const void* data = nullptr;
  int32_t type = 0, element_bytes = 0;
  const int64_t* sizes = nullptr;  // [dims], of the tensor, as its strides
  const int64_t* strides = nullptr;
  size_t dims = 0;
};

// The description: a header, then an entry per parameter in the kernel's order. All numbers are int64.
//   kNumber   bits: an integer, or a float's bits, in the low bytes
//   kPointer  tensor, type, alignment in bytes that the kernel was compiled for
//   kMap      tensor, type, element type of the map, swizzle, fill, rank, then shape, strides and box, each of `rank`
//             numbers in elements, the innermost dimension last
namespace description {
enum Header : int {
  kFunction,
  kGrid,
  kWarps = kGrid + 3,
  kSharedBytes,
  kCluster,      // blocks of one
  kDependent,    // programmatic dependent launch
  kCooperative,  // all blocks at once
  kTensors,
  kParameters,
  kHeader,  // length of the header
};
enum Kind : int { kNumber, kPointer, kMap };
}  // namespace description

struct LaunchDescription {
  const int64_t* numbers = nullptr;
  int64_t length = 0;
};

constexpr size_t kMaxLaunches = 8;

// Checks the descriptions and the tensors, and makes the launches one after the other on `stream` (a CUstream). Returns
// what is wrong, or nothing: the driver launches nothing unless all is right with all of them. The driver is the one
// that has loaded the kernels, so this library needs none to load.
std::string launch_described(const LaunchDescription* launches, size_t count, const LaunchTensor* tensors,
                             size_t num_tensors, void* stream);

}  // namespace gistkern
