// Between rows [strip][dim] and strips [dim][strip], in squares of one vector by one vector.
#pragma once

#include <utility>

#include "lanes.h"

GISTKERN_NAMESPACE_BEGIN

// Lanes kLane of the vector that `a` and `b` make one after the other.
template <int... kLane>
GISTKERN_INLINE Floats shuffle(Floats a, Floats b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, Ints{kLane...});
#endif
}

// Interleaves two vectors: the lanes whose index has `kBit` set come from `b` shifted down (low) or stay (high).
template <int kBit, bool kHigh, int... kLane>
GISTKERN_INLINE Floats interleave(Floats a, Floats b, std::integer_sequence<int, kLane...>) {
  if constexpr (kHigh) {
    return shuffle<(kLane & kBit ? kLanes + kLane : kLane + kBit)...>(a, b);
  } else {
    return shuffle<(kLane & kBit ? kLanes + kLane - kBit : kLane)...>(a, b);
  }
}

template <int kBit>
GISTKERN_INLINE void transpose_stage(Floats (&square)[kLanes]) {
  if constexpr (kBit < kLanes) {
    using Lanes = std::make_integer_sequence<int, kLanes>;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & kBit) continue;
      const Floats low = interleave<kBit, false>(square[i], square[i | kBit], Lanes{});
      const Floats high = interleave<kBit, true>(square[i], square[i | kBit], Lanes{});
      square[i] = low;
      square[i | kBit] = high;
    }
    transpose_stage<kBit * 2>(square);
  }
}

// to[column][row] = from[row][column] for kStrip rows and `columns` (a multiple of kLanes) columns.
inline void rows_to_strip(const float* from, int64_t stride, int64_t columns, float* to) {
  for (int64_t row = 0; row < kStrip; row += kLanes) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      Floats square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(from + (row + i) * stride + column);
      transpose_stage<1>(square);
      for (int i = 0; i < kLanes; ++i) store(to + (column + i) * kStrip + row, square[i]);
    }
  }
}

// The inverse.
inline void strip_to_rows(const float* from, int64_t columns, float* to, int64_t stride) {
  for (int64_t row = 0; row < kStrip; row += kLanes) {
    for (int64_t column = 0; column < columns; column += kLanes) {
      Floats square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = load(from + (column + i) * kStrip + row);
      transpose_stage<1>(square);
      for (int i = 0; i < kLanes; ++i) store(to + (row + i) * stride + column, square[i]);
    }
  }
}

GISTKERN_NAMESPACE_END
