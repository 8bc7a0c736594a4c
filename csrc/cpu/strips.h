// Which keys the rows of a strip see: the mask rule of docs/concepts/mask.md, for kStrip rows at a time.
#pragma once

#include "arguments.h"
#include "lanes.h"

GISTKERN_NAMESPACE_BEGIN

// The keys of one buffer: lane i sees [begin[i], end[i]). `hull` holds every key that some row sees, `core` those that
// every row sees that sees anything; only keys of the hull outside the core need a comparison.
struct Intervals {
  int32_t begin[kStrip], end[kStrip];
  int64_t hull_begin, hull_end, core_begin, core_end;
};

struct Strip {
  Intervals gist, local;
  bool empty[kStrip];  // rows that see nothing, and lanes beyond the last row
};

inline void finish(Intervals& intervals, const bool* empty) {
  int64_t hull_begin = INT32_MAX, hull_end = 0, core_begin = 0, core_end = INT32_MAX;
  for (int i = 0; i < kStrip; ++i) {
    if (empty[i]) continue;
    const int32_t begin = intervals.begin[i], end = intervals.end[i];
    if (begin < end) {
      hull_begin = smaller(hull_begin, begin);
      hull_end = larger(hull_end, end);
    }
    core_begin = larger(core_begin, begin);
    core_end = smaller(core_end, end);
  }
  intervals.hull_begin = smaller(hull_begin, hull_end);
  intervals.hull_end = hull_end;
  intervals.core_begin = smaller(larger(core_begin, intervals.hull_begin), hull_end);
  intervals.core_end = larger(smaller(core_end, hull_end), intervals.core_begin);
}

// The strip of rows [row, row + kStrip) of one sample.
inline void read_strip(const AttentionArguments& x, int64_t sample, int64_t row, Strip& strip) {
  for (int i = 0; i < kStrip; ++i) {
    const bool exists = row + i < x.rows;
    const int64_t at = sample * x.rows + row + i;
    strip.gist.begin[i] = exists ? x.gist_begin[at] : 0;
    strip.gist.end[i] = exists ? x.gist_end[at] : 0;
    strip.local.end[i] = exists ? static_cast<int32_t>(x.tail() + row + i + 1) : 0;
    strip.local.begin[i] = exists ? x.local_begin[at] : 0;
    strip.empty[i] = strip.gist.begin[i] >= strip.gist.end[i] && strip.local.begin[i] >= strip.local.end[i];
  }
  finish(strip.gist, strip.empty);
  finish(strip.local, strip.empty);
}

// Makes [begin, end) hold what the strip sees; start with begin > end.
inline void widen_hull(const Intervals& intervals, int64_t& begin, int64_t& end) {
  if (intervals.hull_begin == intervals.hull_end) return;
  begin = smaller(begin, intervals.hull_begin);
  end = larger(end, intervals.hull_end);
}

// Lanes that see key `key`.
GISTKERN_INLINE Ints sees(const Intervals& intervals, int32_t key, int vector) {
  return (load(intervals.begin + vector * kLanes) <= key) & (load(intervals.end + vector * kLanes) > key);
}

// Calls visit(key) for the keys of [begin, end) that not every row sees.
template <typename Visit>
GISTKERN_INLINE void for_boundary_keys(const Intervals& intervals, int64_t begin, int64_t end, Visit visit) {
  const int64_t core_begin = smaller(larger(intervals.core_begin, begin), end);
  const int64_t core_end = larger(smaller(intervals.core_end, end), core_begin);
  for (int64_t key = begin; key < core_begin; ++key) visit(key);
  for (int64_t key = core_end; key < end; ++key) visit(key);
}

// Scores of keys [begin, end), `stride` floats a key, become -inf in the lanes that do not see the key.
GISTKERN_INLINE void mask_scores(const Intervals& intervals, int64_t begin, int64_t end, float* scores,
                                 int64_t stride) {
  for_boundary_keys(intervals, begin, end, [&](int64_t at) {
    float* row = scores + (at - begin) * stride;
    for (int v = 0; v < kStripVectors; ++v) {
      const Ints seen = sees(intervals, static_cast<int32_t>(at), v);
      store(row + v * kLanes, select(seen, load(row + v * kLanes), broadcast(-__builtin_inff())));
    }
  });
}

GISTKERN_NAMESPACE_END
