// The end of a unit: its warps merge, and the block that is the last of the unit's splits merges those by their LSEs
// (docs/concepts/numerics.md). The order of the splits is fixed, whoever comes last: two runs give the same bits.
#pragma once

#include "gistkern/partial.cuh"

namespace gistkern {

// Parts of a row that a lane loads before it needs the first: they come from L2.
constexpr int kMergeAhead = 8;

// A warp takes 32 * kCount elements of a row at a time. Each split is one column whose score is its LSE: the lanes
// weigh a split each, then all of them take the splits one after another.
template <typename T, int kWarps, int kCount>
__device__ __forceinline__ void merge_splits(const DecodeArguments& arguments, const DecodePlan& plan,
                                             const Unit& unit) {
  int lane = threadIdx.x % 32, head_dim = arguments.head_dim, splits = plan.splits;
  int64_t all_rows = static_cast<int64_t>(arguments.batch) * arguments.query_heads * arguments.query_rows;
  int stretches = (head_dim + 32 * kCount - 1) / (32 * kCount);
  for (int item = threadIdx.x / 32; item < unit.rows * stretches; item += kWarps) {
    int64_t index = row_place(arguments, unit, item / stretches).index;
    int first = (item % stretches * 32 + lane) * kCount;
    const float* part_out = plan.workspace + index * head_dim + first;
    const float* part_lse = plan.workspace + splits * all_rows * head_dim + index;

    float maximum = -INFINITY;
    for (int split = lane; split < splits; split += 32) maximum = fmaxf(maximum, part_lse[split * all_rows]);
    for (int distance = 16; distance > 0; distance /= 2) {
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, distance));
    }

    float values[kCount] = {}, sum = 0.0f;
    for (int from = 0; from < splits; from += 32) {
      float weight = 0.0f;
      if (from + lane < splits) weight = exponential(part_lse[(from + lane) * all_rows], maximum, kLog2E);
      for (int at = 0; at < least(32, splits - from); at += kMergeAhead) {
        float parts[kMergeAhead][kCount] = {};
#pragma unroll
        for (int i = 0; i < kMergeAhead; ++i) {
          if (from + at + i < splits && first < head_dim) {
            load_floats(parts[i], part_out + (from + at + i) * all_rows * head_dim);
          }
        }
#pragma unroll
        for (int i = 0; i < kMergeAhead; ++i) {
          float of_split = __shfl_sync(0xffffffffu, weight, at + i);
          sum += of_split;
#pragma unroll
          for (int e = 0; e < kCount; ++e) values[e] += of_split * parts[i][e];
        }
      }
    }
    if (first >= head_dim) continue;
    float factor = normalizer({maximum, sum});
#pragma unroll
    for (int e = 0; e < kCount; ++e) values[e] *= factor;
    store_elements(static_cast<T*>(arguments.out) + index * head_dim + first, values);
    if (first == 0) arguments.lse[index] = log_sum_exp({maximum, sum}, 1.0f);
  }
}

template <typename T, int kWarps, int kCount>
__device__ __forceinline__ void finish_block(const DecodeArguments& arguments, const DecodePlan& plan, const Unit& unit,
                                             const Partials& partials, int split) {
  __syncthreads();
  merge_warps<T, kWarps, kCount>(arguments, plan, unit, partials, 0, split);
  if (plan.splits == 1) return;
  // The whole block has written its part of the workspace when one thread of it says so; and where that one learns that
  // all splits have, the whole block may read them.
  __syncthreads();
  uint32_t others = plan.splits - 1;
  int index = blockIdx.x % plan.blocks;  // of the unit: the block has no other
  bool last = threadIdx.x == 0 && arrive(plan.arrivals + index, others) == others;
  if (__syncthreads_or(last)) merge_splits<T, kWarps, kCount>(arguments, plan, unit);
}

// To be called by all warps of the unit, after each has stored its partial result.
template <typename T, int kWarps>
__device__ __forceinline__ void finish_unit(const DecodeArguments& arguments, const DecodePlan& plan, const Unit& unit,
                                            const Partials& partials, int split) {
  if (plan.warps_per_unit == 1) {
    __syncwarp();
    int warp = threadIdx.x / 32;
    if (plan.stores_aligned) {
      merge_warps<T, 1, 4>(arguments, plan, unit, partials, warp, split);
    } else {
      merge_warps<T, 1, 1>(arguments, plan, unit, partials, warp, split);
    }
  } else if (plan.stores_aligned) {
    finish_block<T, kWarps, 4>(arguments, plan, unit, partials, split);
  } else {
    finish_block<T, kWarps, 1>(arguments, plan, unit, partials, split);
  }
}

}  // namespace gistkern
