// What a row does not see must not reach it, NaN and infinity included: 0 * NaN is NaN.
//
// Masked probabilities are 0, which hides finite values. Only keys of a strip's hull outside its core have them, and
// they are few (the causal diagonal, rows beside another segment), so their values are looked at; a key whose value is
// not finite leaves the product and is added lane by lane.
#pragma once

#include "rows.h"
#include "strips.h"

GISTKERN_NAMESPACE_BEGIN

inline bool is_finite(const float* row, int64_t dim) {
  float zero = 0.0f;
  int64_t d = 0;
  Floats zeros = {};
  for (; d + kLanes <= dim; d += kLanes) zeros += load(row + d) * 0.0f;
  for (; d < dim; ++d) zero += row[d] * 0.0f;
  return sum(zeros) + zero == 0.0f;
}

// Calls visit(key) for the boundary keys whose values are not all finite.
template <typename Visit>
GISTKERN_INLINE void for_poisoned_keys(const Intervals& intervals, int64_t begin, int64_t end, Block value, int64_t dim,
                                       Visit visit) {
  for_boundary_keys(intervals, begin, end, [&](int64_t at) {
    if (!is_finite(value.data + (at - begin) * value.stride, dim)) visit(at);
  });
}

// A copy of the block in which the poisoned keys' values are 0. To a row that does not see such a key nothing changes,
// not a bit: its probability there is 0.
inline Block without_poison(const Intervals& intervals, int64_t begin, int64_t end, Block value, int64_t dim,
                            float* copy) {
  for (int64_t i = 0; i < end - begin; ++i) std::memcpy(copy + i * dim, value.data + i * value.stride, dim * 4);
  for_poisoned_keys(intervals, begin, end, value, dim,
                    [&](int64_t at) { std::memset(copy + (at - begin) * dim, 0, dim * 4); });
  return {copy, dim};
}

// out[d][lane] += probability[lane] * value[d], for the poisoned keys and the lanes that see them.
inline void add_poison(const Intervals& intervals, int64_t begin, int64_t end, Block value, int64_t dim,
                       const float* probabilities, float* out) {
  for_poisoned_keys(intervals, begin, end, value, dim, [&](int64_t at) {
    const float* row = value.data + (at - begin) * value.stride;
    for (int v = 0; v < kStripVectors; ++v) {
      const Ints seen = sees(intervals, static_cast<int32_t>(at), v);
      const Floats probability = load(probabilities + (at - begin) * kStrip + v * kLanes);
      for (int64_t d = 0; d < dim; ++d) {
        float* target = out + d * kStrip + v * kLanes;
        store(target, load(target) + select(seen, probability * row[d], broadcast(0.0f)));
      }
    }
  });
}

GISTKERN_NAMESPACE_END
