// Values that the kernels take for addresses: intervals, gather lists, slots, pages, lengths. Read where they are on
// the CPU, once per call, O(batch * rows), before a kernel runs. All return null, or what is wrong (static storage).
#pragma once

#include <algorithm>
#include <vector>

#include "arguments.h"

namespace gistkern::cpu {

// Row i of a sample may see gist rows 0 <= begin <= end <= gist_rows, and local rows from 0 <= begin <= its own + 1 on.
inline const char* leaves_buffers(const AttentionArguments& x) {
  bool gists = true, locals = true;  // no early exit: the loop then takes a vector at a time
  for (int64_t sample = 0; sample < x.batch; ++sample) {
    const int32_t* begin = x.gist_begin + sample * x.rows;
    const int32_t* end = x.gist_end + sample * x.rows;
    const int32_t* local = x.local_begin + sample * x.rows;
    const int32_t gist_rows = static_cast<int32_t>(x.gist_rows), tail = static_cast<int32_t>(x.tail());
    for (int32_t row = 0; row < static_cast<int32_t>(x.rows); ++row) {
      gists &= (begin[row] >= 0) & (begin[row] <= end[row]) & (end[row] <= gist_rows);
      locals &= (local[row] >= 0) & (local[row] <= tail + row + 1);
    }
  }
  if (!gists) return "a gist interval leaves the compact rows";
  return locals ? nullptr : "a local interval leaves the local rows";
}

// Of the backward: what `gather` lists are local rows.
inline const char* gather_leaves_rows(const AttentionArguments& x) {
  bool inside = true;
  for (int64_t sample = 0; x.gather && sample < x.batch; ++sample) {
    for (int64_t column = 0; column < x.gist_rows - x.past_rows; ++column) {
      const int64_t row = x.gather[sample * x.gather_stride[0] + column * x.gather_stride[1]];
      inside &= (row >= -1) & (row < x.local_rows);
    }
  }
  return inside ? nullptr : "gather leaves the local rows";
}

// The rows of the buffers behind DecodeArguments, which hold capacities only. Where every sequence has gist rows of its
// own, the intervals are those of attention, empty ones included; over a pool an empty one may stand anywhere.
struct DecodeBuffers {
  int64_t gist_rows, pages;
  bool own_gists;
};

inline const char* leaves_buffers(const DecodeArguments& x, const DecodeBuffers& buffers) {
  for (int64_t sequence = 0; sequence < x.batch; ++sequence) {
    const int64_t length = x.tail_length ? x.tail_length[sequence] : x.tail_capacity;
    if (length < 0 || length > x.tail_capacity) return "tail_length leaves the tail";
    int64_t hull_begin = INT64_MAX, hull_end = 0;
    for (int64_t row = 0; row < x.query_rows; ++row) {
      const int64_t at = sequence * x.interval_stride[0] + row * x.interval_stride[1];
      const int64_t local = x.local_begin ? x.local_begin[at] : 0, begin = x.gist_begin[at], end = x.gist_end[at];
      if (local < 0) return "local_begin is negative";
      if (buffers.own_gists) {
        if (begin < 0 || begin > end || end > buffers.gist_rows) return "a gist interval leaves the compact rows";
        if (local > std::max<int64_t>(0, length - x.query_rows + row + 1))
          return "a local interval leaves the local rows";
      }
      if (begin >= end) continue;
      hull_begin = std::min(hull_begin, begin);
      hull_end = std::max(hull_end, end);
    }
    if (hull_end == 0 && hull_begin == INT64_MAX) hull_begin = 0;
    if (hull_begin < 0 || hull_end > buffers.gist_rows) return "a gist interval leaves the gist rows";
    if (hull_end - hull_begin > x.gist_capacity) return "a sequence sees more gist rows than gist_capacity";
    for (int64_t page = 0; x.page_table && page * x.page_size < length; ++page) {
      const int64_t named = x.page_table[sequence * x.pages_per_sequence + page];
      if (named < 0 || named >= buffers.pages) return "page_table names a page that is not there";
    }
  }
  return nullptr;
}

// `local_rows` of the source; `pool_rows` of the output where rows have slots.
inline const char* leaves_buffers(const CompactArguments& x, int64_t local_rows, int64_t pool_rows) {
  const int64_t columns = static_cast<int64_t>(x.past_rows) + x.gathered_rows;
  std::vector<int64_t> written;
  for (int64_t sample = 0; sample < x.batch; ++sample) {
    for (int64_t column = 0; column < columns; ++column) {
      int64_t row = 0;
      if (column >= x.past_rows) {
        row = x.gather[sample * x.gather_stride[0] + (column - x.past_rows) * x.gather_stride[1]];
        if (row < -1 || row >= local_rows) return "gather leaves the local rows";
      }
      if (!x.slot) continue;
      const int64_t slot = x.slot[sample * columns + column];
      if (slot < -1 || slot >= pool_rows) return "slot leaves the pool";
      if (slot >= 0 && row >= 0) written.push_back(slot);
    }
  }
  std::sort(written.begin(), written.end());
  // work items of several samples would write it at once
  if (std::adjacent_find(written.begin(), written.end()) != written.end()) return "slot names one pool row twice";
  return nullptr;
}

}  // namespace gistkern::cpu
