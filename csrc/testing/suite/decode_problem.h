// The inputs of one decode call: random intervals, and data in exactly the rows that some query row's hull covers.
#pragma once

#include <algorithm>
#include <string>

#include "gistkern/decode.h"
#include "suite/buffer.h"
#include "suite/case.h"

namespace gistkern::suite {

struct DecodeSpec {
  ElementType type = ElementType::kBFloat16;       // of queries and outputs
  ElementType rows_type = ElementType::kBFloat16;  // of keys and values
  int query_heads = 8, kv_heads = 2, query_rows = 1, head_dim = 64, batch = 3;
  int gist_capacity = 50, tail_capacity = 20;
  int pool_rows = 0;  // 0: every sequence has gist_capacity rows of its own
  int page_size = 0;  // 0: not paged
  int multiprocessors = 4;
  Layout query, rows;
  bool some_see_nothing = false;
  bool whole_tail = false;    // tail_length and local_begin null
  bool mixed_types = false;   // gist rows of rows_type, tail rows of type
  bool plain_values = false;  // keys of rows_type, values of type
  enum class Intervals { kBySequence, kByRow, kShared } intervals = Intervals::kBySequence;  // kShared: by all rows
  float loudness = 1.0f;                                                                     // of queries

  std::string name() const {
    std::string result = text("%s-H%dx%d-N%d-D%d-B%d-G%d-T%d", name_of(type), query_heads, kv_heads, query_rows,
                              head_dim, batch, gist_capacity, tail_capacity);
    if (rows_type != type)
      result += text("-%s%s%s", name_of(rows_type), mixed_types ? "-gists" : "", plain_values ? "-keys" : "");
    if (pool_rows > 0) result += text("-pool%d", pool_rows);
    if (page_size > 0) result += text("-page%d", page_size);
    if (rows.rows_first) result += "-rowsfirst";
    if (rows.gap > 0) result += text("-gap%d", rows.gap);
    if (rows.offset > 0) result += text("-offset%d", rows.offset);
    if (some_see_nothing) result += "-blind";
    if (whole_tail) result += "-whole";
    if (intervals != Intervals::kBySequence) result += intervals == Intervals::kByRow ? "-byrow" : "-shared";
    if (loudness != 1.0f) result += "-loud";
    if (multiprocessors != 4) result += text("-SM%d", multiprocessors);
    return result;
  }
};

struct DecodeProblem {
  DecodeProblem(const DecodeSpec& spec, Generator& generator)
      : spec(spec),
        pages(spec.page_size > 0 ? (spec.tail_capacity + spec.page_size - 1) / spec.page_size : 0),
        query(spec.type, spec.batch, spec.query_heads, spec.query_rows, spec.head_dim, spec.query),
        gist_key(make_gists(spec.rows_type)),
        gist_value(make_gists(spec.plain_values ? spec.type : spec.rows_type)),
        tail_key(make_tail(spec.rows_type)),
        tail_value(make_tail(spec.plain_values ? spec.type : spec.rows_type)),
        gist_begin(size_t(spec.batch) * spec.query_rows),
        gist_end(size_t(spec.batch) * spec.query_rows),
        local_begin(size_t(spec.batch) * spec.query_rows),
        tail_length(spec.batch),
        page_table(spec.batch * pages) {
    draw_pages(generator);
    for (int b = 0; b < spec.batch; ++b) {
      for (int i = 0; i < spec.query_rows; ++i) query.put_random(b, i, generator, spec.loudness);
      draw_intervals(b, generator);
      fill_rows(b, generator);
    }
  }

  // The place of tail row `row`: (sample, row of the sample).
  std::pair<int, int> tail_place(int sequence, int row) {
    if (pages == 0) return {sequence, row};
    return {page_table[sequence * pages + row / spec.page_size], row % spec.page_size};
  }
  int gist_sample(int sequence) const { return spec.pool_rows > 0 ? 0 : sequence; }
  int64_t interval_stride(int axis) const {
    using Intervals = DecodeSpec::Intervals;
    if (spec.intervals == Intervals::kShared) return axis == 0 ? 1 : 0;
    if (spec.intervals == Intervals::kByRow) return axis == 0 ? 1 : spec.batch;
    return axis == 0 ? spec.query_rows : 1;
  }
  size_t interval(int sequence, int query_row) const {
    return sequence * interval_stride(0) + query_row * interval_stride(1);
  }
  int tail_end(int sequence, int query_row) { return tail_length[sequence] - spec.query_rows + query_row + 1; }

  DecodeArguments arguments() {
    DecodeArguments a;
    const Rows query_view = query.view();
    a.query = query_view.data;
    std::copy_n(query_view.stride, 3, a.query_stride);
    a.type = spec.type;
    a.gist_key = gist_key.view(), a.gist_value = gist_value.view();
    a.tail_key = tail_key.view(), a.tail_value = tail_value.view();
    if (spec.pool_rows > 0) {
      for (Rows* rows : {&a.gist_key, &a.gist_value}) rows->stride[0] = rows->scale_stride[0] = 0;
    }
    a.gist_begin = gist_begin.get(), a.gist_end = gist_end.get();
    for (int axis : {0, 1}) a.interval_stride[axis] = interval_stride(axis);
    if (!spec.whole_tail) a.local_begin = local_begin.get(), a.tail_length = tail_length.get();
    if (pages > 0) a.page_table = page_table.get();
    a.pages_per_sequence = pages, a.page_size = spec.page_size;
    a.batch = spec.batch, a.query_heads = spec.query_heads, a.kv_heads = spec.kv_heads;
    a.query_rows = spec.query_rows, a.head_dim = spec.head_dim;
    a.gist_capacity = spec.gist_capacity, a.tail_capacity = spec.tail_capacity;
    a.multiprocessors = spec.multiprocessors;
    a.scale = 1.0f / std::sqrt(static_cast<float>(spec.head_dim));
    return a;
  }

  const DecodeSpec spec;
  const int pages;  // per sequence
  RowBuffer query, gist_key, gist_value, tail_key, tail_value;
  Array<int32_t> gist_begin, gist_end, local_begin, tail_length, page_table;

 private:
  RowBuffer make_gists(ElementType type) const {
    const bool pool = spec.pool_rows > 0;
    const int rows = pool ? spec.pool_rows : spec.gist_capacity;
    return {type, pool ? 1 : spec.batch, spec.kv_heads, rows, spec.head_dim, spec.rows};
  }
  RowBuffer make_tail(ElementType type) const {
    if (spec.mixed_types) type = spec.type;
    // one page that no sequence has
    if (pages > 0) return {type, spec.batch * pages + 1, spec.kv_heads, spec.page_size, spec.head_dim, spec.rows};
    return {type, spec.batch, spec.kv_heads, spec.tail_capacity, spec.head_dim, spec.rows};
  }

  void draw_pages(Generator& generator) {
    std::vector<int> numbers(spec.batch * pages + 1);
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = static_cast<int>(i);
    std::shuffle(numbers.begin(), numbers.end(), generator);
    std::copy_n(numbers.begin(), spec.batch * pages, page_table.get());
  }

  // Sequence 0 fills the capacities; odd sequences of a pool share the document of the one before.
  void draw_intervals(int b, Generator& generator) {
    const int buffer_rows = spec.pool_rows > 0 ? spec.pool_rows : spec.gist_capacity;
    const int count = b == 0 ? spec.gist_capacity : between(generator, 0, spec.gist_capacity);
    int low = between(generator, 0, buffer_rows - count), high = low + count;
    if (spec.pool_rows > 0 && b % 2 == 1) {
      low = gist_begin[interval(b - 1, 0)], high = gist_end[interval(b - 1, 0)];
    }
    const bool full = b == 0 || spec.whole_tail || spec.tail_capacity < spec.query_rows;
    tail_length[b] = full ? spec.tail_capacity : between(generator, spec.query_rows, spec.tail_capacity);
    const bool blind = spec.some_see_nothing && b % 3 == 1;
    if (blind && b % 2 == 0) tail_length[b] = 0;
    for (int i = 0; i < spec.query_rows; ++i) {
      const bool empty = blind || (spec.some_see_nothing && b % 3 == 2 && i == 0);
      const int narrower = i == 0 ? 0 : (high - low) / 4;
      gist_begin[interval(b, i)] = low + between(generator, 0, narrower);
      gist_end[interval(b, i)] = empty ? gist_begin[interval(b, i)] : high - between(generator, 0, narrower);
      const int last = std::max(tail_end(b, i), 0);
      local_begin[interval(b, i)] = spec.whole_tail ? 0 : empty ? last : between(generator, 0, last / 2);
    }
  }

  void fill_rows(int b, Generator& generator) {
    int low = INT32_MAX, high = 0, first = INT32_MAX, end = 0;
    for (int i = 0; i < spec.query_rows; ++i) {
      if (gist_begin[interval(b, i)] < gist_end[interval(b, i)]) {
        low = std::min(low, gist_begin[interval(b, i)]), high = std::max(high, gist_end[interval(b, i)]);
      }
      if (local_begin[interval(b, i)] < tail_end(b, i)) {
        first = std::min(first, local_begin[interval(b, i)]), end = std::max(end, tail_end(b, i));
      }
    }
    for (int row = low; row < high; ++row) {
      gist_key.put_random(gist_sample(b), row, generator);
      gist_value.put_random(gist_sample(b), row, generator);
    }
    for (int row = first; row < end; ++row) {
      const auto [sample, place] = tail_place(b, row);
      tail_key.put_random(sample, place, generator);
      tail_value.put_random(sample, place, generator);
    }
    if (pages == 0) return;
    // what no one may follow
    for (int page = (end + spec.page_size - 1) / spec.page_size; page < pages; ++page) {
      page_table[b * pages + page] = -1;
    }
  }
};

}  // namespace gistkern::suite
