// One compact row of keys and values: copied bit for bit, or quantized with a scale of its own.
#pragma once

#include "gistkern/compact.h"
#include "rows.h"

GISTKERN_NAMESPACE_BEGIN

// Elements rounded to nearest even; returns the scale. A row of zeros has scale 0.
inline float quantize(const float* row, int64_t dim, ElementType type, void* to) {
  float largest = 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float magnitude = __builtin_fabsf(row[d]);
    if (magnitude > largest || magnitude != magnitude) largest = magnitude;
    if (largest != largest) break;  // the scale is then NaN, and so is the row
  }
  const bool integer = type == ElementType::kInt8;
  const float scale = largest / (integer ? 127.0f : 448.0f);
  for (int64_t d = 0; d < dim; ++d) {
    const float value = scale == 0.0f ? 0.0f : row[d] / scale;
    if (integer) {
      const float whole = value != value ? 0.0f : __builtin_rintf(value);
      static_cast<int8_t*>(to)[d] = static_cast<int8_t>(whole > 127.0f ? 127.0f : whole < -127.0f ? -127.0f : whole);
    } else {
      static_cast<uint8_t*>(to)[d] = narrow_e4m3(value);
    }
  }
  return scale;
}

// Column `column` of one sample and head (gistkern/compact.h), keys and values.
inline void compact_row(const CompactArguments& x, int64_t sample, int64_t kv_head, int64_t column, float* scratch) {
  const int64_t columns = static_cast<int64_t>(x.past_rows) + x.gathered_rows;
  const bool past = column < x.past_rows;
  const int64_t row =
      past ? column : x.gather[sample * x.gather_stride[0] + (column - x.past_rows) * x.gather_stride[1]];
  const int64_t to_row = x.slot ? x.slot[sample * columns + column] : column;
  if (x.slot && (to_row < 0 || row < 0)) return;
  const int64_t to_sample = x.slot ? 0 : sample;
  const int64_t element = to_sample * x.out_stride[0] + kv_head * x.out_stride[1] + to_row * x.out_stride[2];
  const int64_t scale_at =
      to_sample * x.out_scale_stride[0] + kv_head * x.out_scale_stride[1] + to_row * x.out_scale_stride[2];
  for (const bool is_key : {true, false}) {
    const Rows& from = is_key ? (past ? x.past_key : x.key) : (past ? x.past_value : x.value);
    char* to = static_cast<char*>(is_key ? x.out_key : x.out_value) + element * element_bytes(x.out_type);
    float* scale = is_key ? x.out_key_scale : x.out_value_scale;
    if (row < 0) {
      std::memset(to, 0, x.head_dim * element_bytes(x.out_type));
      if (scale) scale[scale_at] = 0.0f;
    } else if (scale) {
      read_row(from, sample, kv_head, row, x.head_dim, scratch);
      scale[scale_at] = quantize(scratch, x.head_dim, x.out_type, to);
    } else {
      std::memcpy(to, row_address(from, sample, kv_head, row), x.head_dim * element_bytes(x.out_type));
    }
  }
}

GISTKERN_NAMESPACE_END
