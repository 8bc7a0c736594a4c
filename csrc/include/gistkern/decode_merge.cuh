// Merging the splits of a decode launch by their LSEs (docs/concepts/numerics.md). The order is fixed: two runs give
// the same bits.
#pragma once

#include "gistkern/partial.cuh"

namespace gistkern {

constexpr int kMergeWarps = 4;

// kCount elements of a row at a time, over the lanes of a warp. Returns the sum of the weights.
template <typename T, int kCount>
__device__ __forceinline__ float merge_splits(T* out, const float* part_out, const float* part_lse, int64_t all_rows,
                                              int splits, int head_dim, float maximum) {
  float sum = 0.0f;
  for (int first = threadIdx.x % 32 * kCount; first < head_dim; first += 32 * kCount) {
    float values[kCount] = {};
    sum = 0.0f;
#pragma unroll 4
    for (int split = 0; split < splits; ++split) {
      float part[kCount];
      load_floats(part, part_out + split * all_rows * head_dim + first);
      float weight = exponential(part_lse[split * all_rows], maximum, kLog2E);
      sum += weight;
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += weight * part[i];
    }
    float factor = normalizer({maximum, sum});
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] *= factor;
    store_elements(out + first, values);
  }
  return sum;
}

// One warp per row of [batch, query_heads, query_rows]. Each split is one column whose score is its LSE.
template <typename T>
__global__ void __launch_bounds__(kMergeWarps * 32)
    gist_decode_merge_kernel(const DecodeArguments arguments, const DecodePlan plan) {
  int lane = threadIdx.x % 32, head_dim = arguments.head_dim;
  int64_t all_rows = static_cast<int64_t>(arguments.batch) * arguments.query_heads * arguments.query_rows;
  int64_t row = static_cast<int64_t>(blockIdx.x) * kMergeWarps + threadIdx.x / 32;
  if (row >= all_rows) return;
  T* out = static_cast<T*>(arguments.out) + row * head_dim;
  const float* part_out = arguments.workspace + row * head_dim;
  const float* part_lse = arguments.workspace + plan.splits * all_rows * head_dim + row;

  float maximum = -INFINITY;
  for (int split = lane; split < plan.splits; split += 32) maximum = fmaxf(maximum, part_lse[split * all_rows]);
  for (int distance = 16; distance > 0; distance /= 2) {
    maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, distance));
  }
  float sum = plan.stores_aligned
                  ? merge_splits<T, 4>(out, part_out, part_lse, all_rows, plan.splits, head_dim, maximum)
                  : merge_splits<T, 1>(out, part_out, part_lse, all_rows, plan.splits, head_dim, maximum);
  if (lane == 0) arguments.lse[row] = log_sum_exp({maximum, sum}, 1.0f);  // this lane always holds elements
}

}  // namespace gistkern
