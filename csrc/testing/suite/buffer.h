// Rows of keys, values or queries in an allocation that ends with their last element, NaN where nothing was put.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <random>
#include <vector>

#include "suite/elements.h"

namespace gistkern::suite {

using Generator = std::mt19937_64;

inline int between(Generator& generator, int low, int high) {  // both included
  return low + static_cast<int>(generator() % static_cast<uint64_t>(high - low + 1));
}

// Exactly so many bytes, all 0xff: NaN in every float type, and an index no table has. What is too large to be touched
// as a whole (rows gigabytes apart) is zeros on pages of its own.
class Bytes {
 public:
  explicit Bytes(size_t bytes) : size_(bytes) {
    if (is_sparse()) {
      void* const pages =
          mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (pages == MAP_FAILED) std::abort();
      memory_ = static_cast<char*>(pages);
    } else {
      memory_ = static_cast<char*>(std::malloc(bytes));
      std::memset(memory_, 0xff, bytes);
    }
  }
  ~Bytes() {
    if (is_sparse()) {
      munmap(memory_, size_);
    } else {
      std::free(memory_);
    }
  }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  bool is_sparse() const { return size_ > size_t{1} << 30; }
  char* data() { return memory_; }
  size_t size() const { return size_; }

 private:
  char* memory_;
  size_t size_;
};

// A device array of integers.
template <typename T>
class Array : public Bytes {
 public:
  explicit Array(size_t count) : Bytes(count * sizeof(T)) {}
  T* get() { return reinterpret_cast<T*>(data()); }
  T& operator[](size_t i) { return get()[i]; }
};

struct Layout {
  bool rows_first = false;  // [samples, rows, heads, dim] instead of [samples, heads, rows, dim]
  int gap = 0;              // elements between rows
  int offset = 0;           // elements before the first row
};

class RowBuffer {
 public:
  RowBuffer(ElementType type, int samples, int heads, int rows, int dim, Layout layout = {})
      : samples(samples),
        heads(heads),
        rows(rows),
        dim(dim),
        type_(type),
        layout_(layout),
        bytes_((elements(dim + layout.gap) + (elements(1) > 0 ? layout.offset - layout.gap : 0)) * element_bytes(type)),
        scales_(is_code(type) ? elements(1) * sizeof(float) : 0) {}

  Rows view() const {
    Rows view;
    view.type = type_;
    view.data = elements(1) > 0 ? address(0, 0, 0) : nullptr;
    strides(dim + layout_.gap, view.stride);
    if (is_code(type_)) {
      view.scale = elements(1) > 0 ? scale(0, 0, 0) : nullptr;
      strides(1, view.scale_stride);
    }
    return view;
  }

  char* address(int sample, int head, int row) {
    return bytes_.data() + (layout_.offset + place(dim + layout_.gap, sample, head, row)) * element_bytes(type_);
  }
  const char* address(int sample, int head, int row) const {
    return const_cast<RowBuffer*>(this)->address(sample, head, row);
  }
  float* scale(int sample, int head, int row) {
    return reinterpret_cast<float*>(scales_.data()) + place(1, sample, head, row);
  }
  const float* scale(int sample, int head, int row) const {
    return const_cast<RowBuffer*>(this)->scale(sample, head, row);
  }

  double value(int sample, int head, int row, int d) const {
    const double factor = is_code(type_) ? *scale(sample, head, row) : 1.0;
    return factor * decode(type_, address(sample, head, row) + d * element_bytes(type_));
  }

  void put(int sample, int head, int row, const std::vector<float>& values) {
    float factor = 1.0f;
    if (is_code(type_)) {
      float largest = 0.0f;
      for (float value : values) largest = std::fmax(largest, std::fabs(value));
      factor = largest / static_cast<float>(largest_code(type_));
      *scale(sample, head, row) = factor;
    }
    for (int d = 0; d < dim; ++d) {
      encode(type_, factor == 0.0f ? 0.0f : values[d] / factor, address(sample, head, row) + d * element_bytes(type_));
    }
  }

  // A row of all heads, once: rows that several sequences see are the same for all of them.
  void put_random(int sample, int row, Generator& generator, float deviation = 1.0f) {
    std::normal_distribution<float> normal(0.0f, deviation);
    std::vector<float> values(dim);
    for (int head = 0; head < heads; ++head) {
      for (float& value : values) value = normal(generator);
      put(sample, head, row, values);
    }
  }

  ElementType type() const { return type_; }
  Bytes& bytes() { return bytes_; }
  Bytes& scales() { return scales_; }

  const int samples, heads, rows, dim;

 private:
  int64_t elements(int row_elements) const { return int64_t{samples} * heads * rows * row_elements; }
  void strides(int row_elements, int64_t (&stride)[3]) const {
    stride[0] = int64_t{heads} * rows * row_elements;
    stride[1] = layout_.rows_first ? row_elements : int64_t{rows} * row_elements;
    stride[2] = layout_.rows_first ? int64_t{heads} * row_elements : row_elements;
  }
  int64_t place(int row_elements, int sample, int head, int row) const {
    int64_t stride[3];
    strides(row_elements, stride);
    return sample * stride[0] + head * stride[1] + row * stride[2];
  }

  ElementType type_;
  Layout layout_;
  Bytes bytes_, scales_;
};

}  // namespace gistkern::suite
