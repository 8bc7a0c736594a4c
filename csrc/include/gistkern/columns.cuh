// Which columns a unit of work visits and where their rows lie.
//
// A unit is a pack of query rows of one sequence and K/V head: packed row m is query row m / group of query head
// kv_head * group + m % group. It visits the hull of its rows' gist intervals, then the hull of their tail intervals,
// as one range of columns 0, 1, ...; a tile of columns may hold rows of both buffers.
//
// A row inside the hull that is hidden from one query row but not from another has probability 0 there: finite values
// cannot leak, but NaN times 0 is NaN.
#pragma once

#include "gistkern/convert.cuh"
#include "gistkern/plan.h"
#include "gistkern/port.cuh"

namespace gistkern {

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int greatest(int a, int b) { return a > b ? a : b; }

struct Unit {
  int sequence, kv_head;
  int first_row, rows;  // packed rows [first_row, first_row + rows)
};

// Where this warp works.
struct Place {
  int unit, split;
  int member;  // index of the warp among those of its unit
};

__device__ __forceinline__ Place place_of(const DecodePlan& plan) {
  // all lanes have the same; after the shuffle the compiler knows
  int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
  int block = blockIdx.x % plan.blocks, split = blockIdx.x / plan.blocks;
  if (plan.warps_per_unit == 1) return {block * plan.warps + warp, split, 0};
  return {block, split, warp};
}

__device__ __forceinline__ Unit unit_of(int unit, const DecodeArguments& arguments, const DecodePlan& plan) {
  int packed = arguments.query_rows * (arguments.query_heads / arguments.kv_heads);
  int head = unit / plan.packs, first_row = unit % plan.packs * plan.unit_rows;
  return {head / arguments.kv_heads, head % arguments.kv_heads, first_row, least(plan.unit_rows, packed - first_row)};
}

// What one query row sees: two half-open intervals, of buffer rows or of columns.
struct Sight {
  int gist_begin, gist_end;
  int tail_begin, tail_end;

  __device__ __forceinline__ bool sees(int column) const {
    // without short cuts, which would be branches
    return ((column >= gist_begin) & (column < gist_end)) | ((column >= tail_begin) & (column < tail_end));
  }
  __device__ __forceinline__ bool nothing() const { return gist_begin >= gist_end && tail_begin >= tail_end; }
};

__device__ __forceinline__ Sight sight_of(const DecodeArguments& arguments, int sequence, int query_row) {
  int64_t at = sequence * arguments.interval_stride[0] + query_row * arguments.interval_stride[1];
  Sight sight = {0, 0, 0, 0};
  if (arguments.gist_capacity > 0) {
    sight.gist_begin = arguments.gist_begin[at];
    sight.gist_end = arguments.gist_end[at];
  }
  if (arguments.tail_capacity > 0) {
    int length = arguments.tail_length == nullptr ? arguments.tail_capacity : arguments.tail_length[sequence];
    sight.tail_begin = arguments.local_begin == nullptr ? 0 : arguments.local_begin[at];
    sight.tail_end = length - arguments.query_rows + query_row + 1;
  }
  return sight;
}

struct Window {
  int gist_begin, gist_count;  // columns [0, gist_count) are gist rows from gist_begin on
  int tail_begin, count;       // columns [gist_count, count) are tail rows from tail_begin on
  int full;                    // columns [0, full) are seen by every row that sees anything

  // Of buffer rows -> of columns.
  __device__ __forceinline__ Sight in_columns(Sight sight) const {
    int shift = gist_count - tail_begin;
    return {sight.gist_begin - gist_begin, sight.gist_end - gist_begin, sight.tail_begin + shift,
            sight.tail_end + shift};
  }
};

__device__ __forceinline__ Window window_of(const DecodeArguments& arguments, const Unit& unit) {
  constexpr int kFar = 1 << 30;
  int group = arguments.query_heads / arguments.kv_heads;
  int last = (unit.first_row + unit.rows - 1) / group;
  Sight hull = {kFar, 0, kFar, 0}, common = {0, kFar, 0, kFar};
  for (int query_row = unit.first_row / group; query_row <= last; ++query_row) {
    Sight sight = sight_of(arguments, unit.sequence, query_row);
    if (sight.nothing()) continue;
    if (sight.gist_begin < sight.gist_end) {
      hull.gist_begin = least(hull.gist_begin, sight.gist_begin);
      hull.gist_end = greatest(hull.gist_end, sight.gist_end);
    }
    if (sight.tail_begin < sight.tail_end) {
      hull.tail_begin = least(hull.tail_begin, sight.tail_begin);
      hull.tail_end = greatest(hull.tail_end, sight.tail_end);
    }
    common.gist_begin = greatest(common.gist_begin, sight.gist_begin);
    common.gist_end = least(common.gist_end, sight.gist_end);
    common.tail_begin = greatest(common.tail_begin, sight.tail_begin);
    common.tail_end = least(common.tail_end, sight.tail_end);
  }
  int gists = greatest(hull.gist_end - hull.gist_begin, 0), tails = greatest(hull.tail_end - hull.tail_begin, 0);
  int full_gists =
      common.gist_begin <= hull.gist_begin ? least(greatest(common.gist_end - hull.gist_begin, 0), gists) : 0;
  int full_tails =
      common.tail_begin <= hull.tail_begin ? least(greatest(common.tail_end - hull.tail_begin, 0), tails) : 0;
  return {gists > 0 ? hull.gist_begin : 0, gists, tails > 0 ? hull.tail_begin : 0, gists + tails,
          full_gists == gists ? gists + full_tails : full_gists};
}

// Column tiles [begin, end) of one split: an equal share of those that the unit really has.
struct TileRange {
  int begin, end;
};

__device__ __forceinline__ TileRange tiles_of(const Window& window, int tile_columns, int split, int splits) {
  int tiles = (window.count + tile_columns - 1) / tile_columns;
  int share = (tiles + splits - 1) / splits;
  int begin = least(split * share, tiles);
  return {begin, least(begin + share, tiles)};
}

// A column's place in its buffer: `row` counts from the window's first gist row, or from the start of the tail or page.
struct Column {
  bool is_gist;
  int row, page;
};

__device__ __forceinline__ Column column_at(const DecodeArguments& arguments, const Unit& unit, const Window& window,
                                            int column) {
  if (column < window.gist_count) return {true, column, 0};
  int row = window.tail_begin + (column - window.gist_count);
  if (arguments.page_table == nullptr) return {false, row, 0};
  int page = static_cast<unsigned>(row) / static_cast<unsigned>(arguments.page_size);
  int64_t entry = static_cast<int64_t>(unit.sequence) * arguments.pages_per_sequence + page;
  return {false, row - page * arguments.page_size, arguments.page_table[entry]};
}

// Addresses of one head's rows (of keys, values or their scales) in both buffers. The strides stay in the kernel's
// parameters, which costs no registers.
struct RowAddresses {
  const char *gist, *tail;
  const ByteStrides& strides;

  __device__ __forceinline__ const char* of(const Column& column) const {
    if (column.is_gist) return gist + column.row * strides.gist[2];
    return tail + column.page * strides.page + column.row * strides.tail[2];
  }
};

// A buffer that does not exist is null and stays it.
__device__ __forceinline__ const char* row_address(const void* data, const int64_t (&byte_stride)[3], int64_t sample,
                                                   int64_t head, int64_t row) {
  if (data == nullptr) return nullptr;
  return static_cast<const char*>(data) + sample * byte_stride[0] + head * byte_stride[1] + row * byte_stride[2];
}

__device__ __forceinline__ RowAddresses addresses(const void* gist, const void* tail, const ByteStrides& strides,
                                                  const Unit& unit, const Window& window) {
  return {row_address(gist, strides.gist, unit.sequence, unit.kv_head, window.gist_begin),
          row_address(tail, strides.tail, unit.sequence, unit.kv_head, 0), strides};
}

// All rows that a unit reads.
struct Sources {
  RowAddresses keys, values, key_scales, value_scales;
};

__device__ __forceinline__ Sources sources_of(const DecodeArguments& a, const DecodePlan& plan, const Unit& unit,
                                              const Window& window) {
  return {addresses(a.gist_key.data, a.tail_key.data, plan.keys, unit, window),
          addresses(a.gist_value.data, a.tail_value.data, plan.values, unit, window),
          addresses(a.gist_key.scale, a.tail_key.scale, plan.key_scales, unit, window),
          addresses(a.gist_value.scale, a.tail_value.scale, plan.value_scales, unit, window)};
}

// The factor of a column's codes; 1 where its buffer holds elements.
__device__ __forceinline__ float scale_of(const RowAddresses& scales, const Rows& gist, const Rows& tail,
                                          const Column& column) {
  if (!holds_codes(column.is_gist ? gist.type : tail.type)) return 1.0f;
  return *reinterpret_cast<const float*>(scales.of(column));
}

}  // namespace gistkern
