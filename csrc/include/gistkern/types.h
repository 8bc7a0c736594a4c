// Element types and the strided row buffers that every launcher takes. Plain C++: no CUDA, no torch.
#pragma once

#include <cstdint>

namespace gistkern {

// Matches ELEMENT_TYPES in gistkern/backends/native.py.
enum class ElementType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt8 = 3, kFloat8E4M3 = 4 };

inline int element_bytes(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return 4;
    case ElementType::kFloat16:
    case ElementType::kBFloat16:
      return 2;
    default:
      return 1;
  }
}

// Rows of head_dim contiguous elements: row r of head h of sample b starts at element
// b * stride[0] + h * stride[1] + r * stride[2]. A quantized buffer has one float per (sample, row, head) by which its
// elements are multiplied, addressed the same way with scale_stride; otherwise scale is null.
struct Rows {
  const void* data = nullptr;
  const float* scale = nullptr;
  int64_t stride[3] = {0, 0, 0};
  int64_t scale_stride[3] = {0, 0, 0};
  ElementType type = ElementType::kBFloat16;
};

}  // namespace gistkern
