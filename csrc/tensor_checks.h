// What the operators ask of their tensors before memory is touched: shapes that agree, element types, strides, devices,
// sizes that fit the kernels' integers. Part of bindings.cpp, and with it the only code that knows torch. The values
// that kernels take for addresses are checked after this (cpu/bounds.h).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace gistkern::checks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Shape = std::initializer_list<int64_t>;

// More than any memory holds: products of sizes then stay far from 2^63, scratch space included. Expanded tensors reach
// it.
constexpr int64_t kMostElements = int64_t{1} << 48;

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream text;
  text << "gistkern: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

template <typename Sizes>
std::string listed(const Sizes& sizes) {
  std::ostringstream text;
  for (auto size : sizes) text << (text.tellp() == 0 ? "[" : ", ") << size;
  return text.str().empty() ? "[]" : text.str() + "]";
}

inline bool has_shape(const Tensor& tensor, Shape shape) {
  const auto sizes = tensor.sizes();
  return std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end());
}

inline void require_shape(const char* name, const Tensor& tensor, Shape shape) {
  if (!has_shape(tensor, shape)) require(false, name, " must be ", listed(shape), ", got ", listed(tensor.sizes()));
}

inline void require_dims(const char* name, const Tensor& tensor, int64_t dims) {
  require(tensor.dim() == dims, name, " must have ", dims, " dimensions, got ", listed(tensor.sizes()));
}

// Same device as `first`: the CPU, or one GPU.
inline void require_device(const char* name, const Tensor& tensor, const Tensor& first) {
  const bool together =
      first.is_cpu() ? tensor.is_cpu() : tensor.is_cuda() && tensor.get_device_index() == first.get_device_index();
  require(together, name, " must be on the device of the other tensors, the CPU or a GPU");
}

// Rows of contiguous elements, of a type that the caller compares itself.
inline void require_rows(const char* name, const Tensor& tensor, Shape shape, const Tensor& first) {
  require_shape(name, tensor, shape);
  require_device(name, tensor, first);
  require(tensor.numel() <= kMostElements, name, " has too many elements");
  const int64_t last = tensor.dim() - 1;
  require(tensor.stride(last) == 1 || tensor.size(last) == 1 || tensor.numel() == 0, name,
          " must have contiguous rows: its last dimension has stride ", tensor.stride(last));
}

inline void require_type(const char* name, const Tensor& tensor, ScalarType type) {
  require(tensor.scalar_type() == type, name, " must be ", torch::headeronly::toString(type), ", got ",
          torch::headeronly::toString(tensor.scalar_type()));
}

inline void require_rows_of(const char* name, const Tensor& tensor, Shape shape, const Tensor& first) {
  require_rows(name, tensor, shape, first);
  require_type(name, tensor, first.scalar_type());
}

// Integers or floats that are read one after the other.
inline void require_vector(const char* name, const Tensor& tensor, ScalarType type, Shape shape, const Tensor& first) {
  require_type(name, tensor, type);
  require_shape(name, tensor, shape);
  require_device(name, tensor, first);
  require(tensor.is_contiguous(), name, " must be contiguous");
}

// A list of local rows for each sample, with any strides; a kernel's arguments are checked for its values.
inline void require_gather(const Tensor& gather, int64_t batch, const Tensor& first) {
  require_dims("gather", gather, 2);
  require_type("gather", gather, ScalarType::Long);
  require_shape("gather", gather, {batch, gather.size(1)});
  require_device("gather", gather, first);
  require(gather.numel() <= kMostElements, "gather has too many elements");
}

inline void require_float(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  require(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, name,
          " must be float32, float16 or bfloat16, got ", torch::headeronly::toString(type));
}

inline bool is_quantized(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Char || tensor.scalar_type() == ScalarType::Float8_e4m3fn;
}

// A scale for each row where the rows are quantized, and only there.
inline void require_scale(const char* name, const MaybeTensor& scale, const Tensor& rows) {
  require(scale.has_value() == is_quantized(rows), name, is_quantized(rows) ? " is missing" : " is for quantized rows");
  if (!scale) return;
  require_type(name, *scale, ScalarType::Float);
  require_device(name, *scale, rows);
  const auto sizes = rows.sizes(), found = scale->sizes();
  require(std::equal(found.begin(), found.end(), sizes.begin(), sizes.end() - 1), name, " must be ", listed(sizes),
          " without its last dimension, got ", listed(found));
}

inline int32_t to_int32(const char* name, int64_t value, int64_t least = 0) {
  require(value >= least && value <= INT32_MAX, name, " must lie in ", least, "..2^31 - 1, got ", value);
  return static_cast<int32_t>(value);
}

// As a float: one that rounds to 0 or infinity would make every probability NaN.
inline float to_scale(double scale) {
  const float narrow = static_cast<float>(scale);
  require(narrow >= 0x1p-126f && narrow <= 0x1p126f, "scale must lie in 2^-126..2^126, got ", scale);
  return narrow;
}

// A written tensor of which two elements lie in one place.
inline void require_no_overlap(const char* name, const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> axes;  // (stride, size)
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    if (tensor.size(axis) == 0) return;
    if (tensor.size(axis) > 1) axes.emplace_back(tensor.stride(axis), tensor.size(axis));
  }
  std::sort(axes.begin(), axes.end());
  int64_t span = 1;
  for (const auto& [stride, size] : axes) {
    require(stride >= span, name, " is written, but some of its elements share memory");
    span += stride * (size - 1);
  }
}

inline void require_cpu(const Tensor& tensor) { require(tensor.is_cpu(), "the CPU kernels take CPU tensors"); }

// Everything that attention reads, and what follows from the sizes. Intervals are checked in the arguments.
inline void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& gist_k,
                            const Tensor& gist_v, const Tensor& gist_begin, const Tensor& gist_end,
                            const Tensor& local_begin) {
  for (const auto& [name, tensor] : {std::pair{"q", &q}, {"k", &k}, {"gist_k", &gist_k}})
    require_dims(name, *tensor, 4);
  require_cpu(q);
  require_float("q", q);
  const int64_t batch = to_int32("batch", q.size(0), 1), dim = to_int32("head_dim", q.size(3), 1);
  const int64_t rows = to_int32("the number of query rows", q.size(2), 1), heads = to_int32("heads", q.size(1), 1);
  const int64_t kv_heads = to_int32("key/value heads", k.size(1), 1);
  require(heads % kv_heads == 0, "query heads (", heads, ") must be a multiple of key/value heads (", kv_heads, ")");
  const int64_t local_rows = to_int32("the number of local rows", k.size(2), rows);
  const int64_t gist_rows = to_int32("the number of gist rows", gist_k.size(2));
  require_rows_of("q", q, {batch, heads, rows, dim}, q);
  for (const auto& [name, tensor] : {std::pair{"k", &k}, {"v", &v}}) {
    require_rows_of(name, *tensor, {batch, kv_heads, local_rows, dim}, q);
  }
  for (const auto& [name, tensor] : {std::pair{"gist_k", &gist_k}, {"gist_v", &gist_v}}) {
    require_rows_of(name, *tensor, {batch, kv_heads, gist_rows, dim}, q);
  }
  for (const auto& [name, tensor] :
       {std::pair{"gist_begin", &gist_begin}, {"gist_end", &gist_end}, {"local_begin", &local_begin}}) {
    require_vector(name, *tensor, ScalarType::Int, {batch, rows}, q);
  }
}

}  // namespace gistkern::checks
