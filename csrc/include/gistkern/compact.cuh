// Compaction: a group of lanes per row and head copies it bit for bit, or quantizes it in its registers.
#pragma once

#include "gistkern/chunk.cuh"
#include "gistkern/compact.h"

namespace gistkern {

constexpr int kCompactThreads = 128;
// Elements of a row that one lane quantizes, so that a warp holds rows of up to 256.
constexpr int kCompactElements = 8;
constexpr int kMaxQuantizedDim = 32 * kCompactElements;

// Keys or values: where rows come from and go to, and where 128-bit accesses are possible.
struct CompactSide {
  Rows local, past;
  char* out = nullptr;
  float* out_scale = nullptr;
  bool local_aligned = false, past_aligned = false, out_aligned = false;
};

struct CompactPlan {
  CompactSide sides[2];   // keys, values
  int element_bytes = 0;  // of out
  bool quantized = false;
  int lanes = 1;       // per row
  int row_blocks = 0;  // per (side, sample, head)
};

// Copies a row, or writes zeros where `from` is null.
template <typename Unit>
__device__ __forceinline__ void copy_units(char* out, const char* from, int bytes, int lane, int lanes) {
  for (int at = lane; at < bytes / static_cast<int>(sizeof(Unit)); at += lanes) {
    reinterpret_cast<Unit*>(out)[at] = from == nullptr ? Unit{} : reinterpret_cast<const Unit*>(from)[at];
  }
}

__device__ __forceinline__ void copy_row(char* out, const char* from, int bytes, int element_bytes, bool aligned,
                                         int lane, int lanes) {
  if (aligned) {
    copy_units<uint4>(out, from, bytes, lane, lanes);
  } else if (element_bytes == 4) {
    copy_units<uint32_t>(out, from, bytes, lane, lanes);
  } else if (element_bytes == 2) {
    copy_units<uint16_t>(out, from, bytes, lane, lanes);
  } else {
    copy_units<uint8_t>(out, from, bytes, lane, lanes);
  }
}

__device__ __forceinline__ void load_values(float (&values)[kCompactElements], const char* row, ElementType type,
                                            int first, int head_dim, bool aligned) {
  uint32_t words[kCompactElements] = {};
  if (type == ElementType::kFloat32) {
    load_chunk<4, kCompactElements>(words, row, first, head_dim, aligned);
    chunk_to_floats(values, words, float());
  } else {
    load_chunk<2, kCompactElements>(words, row, first, head_dim, aligned);
    if (type == ElementType::kFloat16) {
      chunk_to_floats(values, words, half());
    } else {
      chunk_to_floats(values, words, __nv_bfloat16());
    }
  }
}

// Of all lanes of the row's group; the row's magnitudes compare as integers, with NaN above all: a row that is not
// finite gets a scale that is not.
__device__ __forceinline__ float row_scale(const float (&values)[kCompactElements], ElementType type, int lanes) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kCompactElements; ++i) {
    uint32_t magnitude = bits_as<uint32_t>(values[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    uint32_t other = __shfl_xor_sync(0xffffffffu, largest, distance);
    largest = other > largest ? other : largest;
  }
  return bits_as<float>(largest) / largest_code(type);
}

__device__ __forceinline__ void store_codes(char* out, const float (&values)[kCompactElements], float scale,
                                            ElementType type, int first, int head_dim, bool aligned) {
  if (first >= head_dim) return;
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kCompactElements; ++i) {
    words[i / 4] |= static_cast<uint32_t>(quantize(values[i], scale, type)) << (i % 4 * 8);
  }
  if (aligned) {
    *reinterpret_cast<uint2*>(out + first) = make_uint2(words[0], words[1]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCompactElements; ++i) {
    if (first + i < head_dim) out[first + i] = static_cast<char>(words[i / 4] >> (i % 4 * 8));
  }
}

// Element offset of a row.
__device__ __forceinline__ int64_t row_offset(const int64_t (&stride)[3], int64_t sample, int64_t head, int64_t row) {
  return sample * stride[0] + head * stride[1] + row * stride[2];
}

__global__ void __launch_bounds__(kCompactThreads)
    gist_compact_kernel(const CompactArguments arguments, const CompactPlan plan) {
  const CompactArguments& a = arguments;
  int group = threadIdx.x / plan.lanes, lane = threadIdx.x % plan.lanes, rows = a.past_rows + a.gathered_rows;
  int row = static_cast<int>(blockIdx.x % plan.row_blocks) * (kCompactThreads / plan.lanes) + group;
  int head_index = blockIdx.x / plan.row_blocks;  // over [key or value, sample, head]
  int head = head_index % a.kv_heads, sample = head_index / a.kv_heads % a.batch;
  const CompactSide& side = plan.sides[head_index / a.kv_heads / a.batch];

  // where the row comes from (negative: a filler) and goes to
  bool exists = row < rows, is_past = row < a.past_rows;
  int64_t source = row, target = row, target_sample = sample;
  if (exists && !is_past) {
    source = a.gather[sample * a.gather_stride[0] + (row - a.past_rows) * a.gather_stride[1]];
  }
  if (exists && a.slot != nullptr) {
    target = a.slot[static_cast<int64_t>(sample) * rows + row];
    target_sample = 0;
    exists = target >= 0 && source >= 0;
  }
  ElementType type = is_past ? side.past.type : side.local.type;
  bool from_aligned = is_past ? side.past_aligned : side.local_aligned;
  const char* from = nullptr;
  const float* from_scale = nullptr;
  if (exists && source >= 0) {
    int from_bytes = type == ElementType::kFloat32 ? 4 : holds_codes(type) ? 1 : 2;
    int64_t offset = is_past ? row_offset(side.past.stride, sample, head, source)
                             : row_offset(side.local.stride, sample, head, source);
    int64_t scale_offset = is_past ? row_offset(side.past.scale_stride, sample, head, source)
                                   : row_offset(side.local.scale_stride, sample, head, source);
    from = static_cast<const char*>(is_past ? side.past.data : side.local.data) + offset * from_bytes;
    if (holds_codes(type)) from_scale = (is_past ? side.past.scale : side.local.scale) + scale_offset;
  }
  char* out = side.out + row_offset(a.out_stride, target_sample, head, target) * plan.element_bytes;

  if (plan.quantized) {  // the same for all threads: the shuffles need whole warps
    bool quantizes = from != nullptr && type != a.out_type;
    float values[kCompactElements] = {};
    int first = lane * kCompactElements;
    if (quantizes) load_values(values, from, type, first, a.head_dim, from_aligned);
    float scale = row_scale(values, a.out_type, plan.lanes);
    if (!exists) return;
    if (!quantizes) scale = from_scale == nullptr ? 0.0f : *from_scale;
    if (lane == 0) side.out_scale[row_offset(a.out_scale_stride, target_sample, head, target)] = scale;
    if (quantizes) {
      store_codes(out, values, scale, a.out_type, first, a.head_dim, side.out_aligned);
      return;
    }
  }
  if (!exists) return;
  int bytes = a.head_dim * plan.element_bytes;
  bool aligned = side.out_aligned && (from == nullptr || from_aligned) && bytes % 16 == 0;
  copy_row(out, from, bytes, plan.element_bytes, aligned, lane, plan.lanes);
}

}  // namespace gistkern
