// Partial results of the warps that share a unit, in shared memory, and how they become output and LSE.
#pragma once

#include "gistkern/columns.cuh"
#include "gistkern/convert.cuh"
#include "gistkern/softmax.cuh"

namespace gistkern {

// Per warp: [rows, width + padding] unnormalized outputs, [rows] maxima, [rows] sums.
struct Partials {
  float* data;
  int warp_floats;  // from one warp's to the next
  int rows, width;

  __device__ __forceinline__ float* output(int warp, int row) const {
    return data + warp * warp_floats + row * (width + kPartialPadding);
  }
  __device__ __forceinline__ float* statistics(int warp, int row) const {
    return data + warp * warp_floats + rows * (width + kPartialPadding) + 2 * row;
  }
  __device__ __forceinline__ void store_statistics(int warp, int row, RunningSoftmax state) const {
    statistics(warp, row)[0] = state.maximum;
    statistics(warp, row)[1] = state.sum;
  }
  __device__ __forceinline__ RunningSoftmax load_statistics(int warp, int row) const {
    return {statistics(warp, row)[0], statistics(warp, row)[1]};
  }
};

// Packed row -> its query row and its place among all [batch, query_heads, query_rows].
struct RowPlace {
  int query_row, head;
  int64_t index;
};

__device__ __forceinline__ RowPlace row_place(const DecodeArguments& arguments, const Unit& unit, int row) {
  int group = arguments.query_heads / arguments.kv_heads, packed = unit.first_row + row;
  int query_row = packed / group, head = unit.kv_head * group + packed % group;
  int64_t heads = static_cast<int64_t>(unit.sequence) * arguments.query_heads + head;
  return {query_row, head, heads * arguments.query_rows + query_row};
}

// One element, or four at an address that is a multiple of four elements.
__device__ __forceinline__ void load_floats(float (&values)[1], const float* from) { values[0] = *from; }
__device__ __forceinline__ void load_floats(float (&values)[4], const float* from) {
  float4 four = *reinterpret_cast<const float4*>(from);
  values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
}

template <typename T>
__device__ __forceinline__ void store_elements(T* out, const float (&values)[1]) {
  store_element(out, values[0]);
}
__device__ __forceinline__ void store_elements(float* out, const float (&values)[4]) {
  *reinterpret_cast<float4*>(out) = make_float4(values[0], values[1], values[2], values[3]);
}
template <typename T>
__device__ __forceinline__ void store_elements(T* out, const float (&values)[4]) {
  *reinterpret_cast<uint2*>(out) =
      make_uint2(pack_floats<T>(values[0], values[1]), pack_floats<T>(values[2], values[3]));
}

// Merges the unit's warps by their maxima (docs/concepts/numerics.md) and writes every row once: its output, or with
// several splits its part of the workspace.
template <typename T, int kWarps, int kCount>
__device__ __forceinline__ void merge_warps(const DecodeArguments& arguments, const DecodePlan& plan, const Unit& unit,
                                            const Partials& partials, int first_warp, int split) {
  int row_threads = kWarps * 32 / unit.rows, thread = threadIdx.x % (kWarps * 32);
  int row = thread / row_threads;
  if (row >= unit.rows) return;
  RunningSoftmax merged, states[kWarps];
  float weights[kWarps];
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    states[warp] = partials.load_statistics(first_warp + warp, row);
    merged.maximum = fmaxf(merged.maximum, states[warp].maximum);
  }
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    weights[warp] = exponential(states[warp].maximum, merged.maximum, arguments.scale * kLog2E);
    merged.sum += states[warp].sum * weights[warp];
  }
  float factor = normalizer(merged);

  int64_t all_rows = static_cast<int64_t>(arguments.batch) * arguments.query_heads * arguments.query_rows;
  int64_t index = row_place(arguments, unit, row).index, part_index = split * all_rows + index;
  for (int first = thread % row_threads * kCount; first < arguments.head_dim; first += row_threads * kCount) {
    float values[kCount] = {};
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      float part[kCount];
      load_floats(part, partials.output(first_warp + warp, row) + first);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        // where nothing was seen, what was accumulated, if anything, counts for nothing
        if (states[warp].sum != 0.0f) values[i] += part[i] * weights[warp];
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] *= factor;
    if (plan.splits == 1) {
      store_elements(static_cast<T*>(arguments.out) + index * arguments.head_dim + first, values);
    } else {
      store_elements(plan.workspace + part_index * arguments.head_dim + first, values);
    }
  }
  if (thread % row_threads == 0) {
    float* part_lse = plan.workspace + plan.splits * all_rows * arguments.head_dim + part_index;
    *(plan.splits == 1 ? arguments.lse + index : part_lse) = log_sum_exp(merged, arguments.scale);
  }
}

}  // namespace gistkern
