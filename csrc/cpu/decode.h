// Decoding: a few query rows over gist rows and a tail. Every key and value is read once, vectors run over head_dim.
#pragma once

#include "exp2.h"
#include "gistkern/decode.h"
#include "rows.h"
#include "shield.h"
#include "transpose.h"

GISTKERN_NAMESPACE_BEGIN

// keys and values of a block, at head_dim 128, fit in the first-level cache together
constexpr int64_t kDecodeKeys = 32;
// packed rows that share each load of a key or value, and vectors of output that stay in registers meanwhile
constexpr int kDecodeRows = 2;
constexpr int kDecodeSums = 8;
constexpr int64_t kMaximumQueryRows = 8;

// What each query row of one sequence sees, and the hull over its rows; column 0 is the hull's first gist row.
struct DecodeColumns {
  int64_t gist_begin[kMaximumQueryRows], gist_end[kMaximumQueryRows];
  int64_t local_begin[kMaximumQueryRows], local_end[kMaximumQueryRows];
  int64_t hull_gist, gist_columns, hull_local, columns;
};

inline DecodeColumns decode_columns(const DecodeArguments& x, int64_t sequence) {
  DecodeColumns seen;
  const int64_t length = x.tail_length ? x.tail_length[sequence] : x.tail_capacity;
  int64_t gist_begin = INT64_MAX, gist_end = 0, local_begin = INT64_MAX, local_end = 0;
  for (int64_t i = 0; i < x.query_rows; ++i) {
    const int64_t at = sequence * x.interval_stride[0] + i * x.interval_stride[1];
    seen.gist_begin[i] = x.gist_begin[at];
    seen.gist_end[i] = x.gist_end[at];
    seen.local_begin[i] = x.local_begin ? x.local_begin[at] : 0;
    seen.local_end[i] = length - x.query_rows + i + 1;
    if (seen.gist_begin[i] < seen.gist_end[i]) {
      gist_begin = smaller(gist_begin, seen.gist_begin[i]);
      gist_end = larger(gist_end, seen.gist_end[i]);
    }
    if (seen.local_begin[i] < seen.local_end[i]) {
      local_begin = smaller(local_begin, seen.local_begin[i]);
      local_end = larger(local_end, seen.local_end[i]);
    }
  }
  seen.hull_gist = smaller(gist_begin, gist_end);
  seen.gist_columns = gist_end - seen.hull_gist;
  seen.hull_local = smaller(local_begin, local_end);
  seen.columns = seen.gist_columns + local_end - seen.hull_local;
  return seen;
}

// scores[row][key] = query[row] . key for up to kDecodeKeys keys, head_dim elements each. Rows of queries are `width`
// floats apart, rows of scores kDecodeKeys.
template <int kRows>
inline void dot_products(const float* query, int64_t width, Block key, int64_t count, int64_t dim, float* scores) {
  constexpr int kKeys = kLanes / kRows;  // a vector of sums for each row and key, then one transpose adds them up
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t first = 0; first < count; first += kKeys) {
    const int64_t keys = smaller(kKeys, count - first);
    const float* rows[kKeys];  // beyond the last key: the last key again
    for (int i = 0; i < kKeys; ++i) rows[i] = key.data + (first + smaller(i, keys - 1)) * key.stride;
    Floats sums[kLanes] = {};
    for (int64_t d = 0; d < whole; d += kLanes) {
      Floats part[kRows];
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) part[r] = load(query + r * width + d);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Floats element = load(rows[i] + d);
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) sums[r * kKeys + i] += part[r] * element;
      }
    }
    transpose_stage<1>(sums);
    Floats total = sums[0];
    for (int i = 1; i < kLanes; ++i) total += sums[i];
    for (int r = 0; r < kRows; ++r) {
      for (int64_t i = 0; i < keys; ++i) {
        float rest = 0.0f;
        for (int64_t d = whole; d < dim; ++d) rest += query[r * width + d] * rows[i][d];
        scores[r * kDecodeKeys + first + i] = total[r * kKeys + i] + rest;
      }
    }
  }
}

// out[row] = out[row] * rescale[row] + sum_key probabilities[row][key] * value[key], `kVectors` vectors of each row.
template <int kRows, int kVectors>
GISTKERN_INLINE void add_value_vectors(const float* probabilities, const float* value, int64_t stride, int64_t count,
                                       const float* rescale, float* out, int64_t dim) {
  Floats sums[kRows][kVectors];
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[r][v] = load(out + r * dim + v * kLanes) * rescale[r];
  }
  for (int64_t i = 0; i < count; ++i) {
    Floats elements[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) elements[v] = load(value + i * stride + v * kLanes);
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] += probabilities[r * kDecodeKeys + i] * elements[v];
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(out + r * dim + v * kLanes, sums[r][v]);
  }
}

// Whether some row of the block is not finite: its products with probabilities of 0 would be NaN.
inline bool has_poison(Block value, int64_t count, int64_t dim) {
  for (int64_t i = 0; i < count; ++i) {
    if (!is_finite(value.data + i * value.stride, dim)) return true;
  }
  return false;
}

template <int kRows>
inline void add_values(const float* probabilities, Block value, int64_t count, int64_t dim, const float* rescale,
                       bool masked, float* out) {
  constexpr int kVectors = kDecodeSums / kRows;
  int64_t d = 0;
  if (!masked || !has_poison(value, count, dim)) {
    for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes) {
      add_value_vectors<kRows, kVectors>(probabilities, value.data + d, value.stride, count, rescale, out + d, dim);
    }
    for (; d + kLanes <= dim; d += kLanes) {
      add_value_vectors<kRows, 1>(probabilities, value.data + d, value.stride, count, rescale, out + d, dim);
    }
  }
  for (; d < dim; ++d) {  // what is left of a row; all of it where a key that is not seen may be NaN
    for (int r = 0; r < kRows; ++r) {
      float total = out[r * dim + d] * rescale[r];
      for (int64_t i = 0; i < count; ++i) {
        const float probability = probabilities[r * kDecodeKeys + i];
        if (probability != 0.0f) total += probability * value.data[i * value.stride + d];
      }
      out[r * dim + d] = total;
    }
  }
}

struct DecodeRow {
  float maximum, sum;
};

// Softmax step of one row over scores that start at key `first`, of which it sees [begin, end). Returns the factor for
// what was summed before; the scores become probabilities.
inline float softmax_step(float* scores, int64_t count, int64_t first, int64_t begin, int64_t end, float log2_scale,
                          DecodeRow& row) {
  float largest = row.maximum;
  for (int64_t i = 0; i < count; ++i) {
    if (first + i < begin || first + i >= end) scores[i] = -__builtin_inff();
    if (scores[i] > largest) largest = scores[i];
  }
  const float base = largest == -__builtin_inff() ? 0.0f : largest;
  for (int64_t i = count; i < round_up(count, kLanes); ++i) scores[i] = -__builtin_inff();
  Floats total = {};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats probability = exp2((load(scores + i) - base) * log2_scale);
    total += probability;
    store(scores + i, probability);
  }
  const float rescale = exp2(broadcast((row.maximum - base) * log2_scale))[0];
  row.sum = row.sum * rescale + sum(total);
  row.maximum = largest;
  return rescale;
}

// Keys and values [first, first + count) of one buffer, and what each query row sees of the buffer.
struct DecodeBlock {
  Block key, value;
  int64_t count, first;
  const int64_t *begin, *end;
};

// Adds a block to `kRows` packed rows, of which the first is packed row `row`.
template <int kRows>
inline void decode_rows(const DecodeArguments& x, const DecodeBlock& block, int64_t row, const float* query,
                        float log2_scale, float* scores, DecodeRow* state, float* out) {
  float rescale[kRows];
  bool masked = false;
  dot_products<kRows>(query, round_up(x.head_dim, kLanes), block.key, block.count, x.head_dim, scores);
  for (int r = 0; r < kRows; ++r) {
    const int64_t i = (row + r) % x.query_rows;
    masked |= block.begin[i] > block.first || block.end[i] < block.first + block.count;
    rescale[r] = softmax_step(scores + r * kDecodeKeys, block.count, block.first, block.begin[i], block.end[i],
                              log2_scale, state[r]);
  }
  add_values<kRows>(scores, block.value, block.count, x.head_dim, rescale, masked, out);
}

// Columns [first, first + count) of one buffer: where the tail is paged, at most up to the end of the page.
inline int64_t within_page(const DecodeArguments& x, int64_t first, int64_t count) {
  return smaller(count, x.page_size - first % x.page_size);
}

inline int64_t decode_scratch_floats(const DecodeArguments& x) {
  const int64_t rows = x.query_rows * (x.query_heads / x.kv_heads);
  return rows * round_up(x.head_dim, kLanes) + 2 * kDecodeKeys * x.head_dim + kDecodeRows * kDecodeKeys + 2 * rows;
}

// One split of one sequence and key/value head: fp32 output [packed rows][head_dim] and natural-log LSE [packed rows],
// where packed row g * query_rows + i is query row i of the group's head g.
inline void decode_item(const DecodeArguments& x, int64_t sequence, int64_t kv_head, int64_t split, int64_t splits,
                        float* out, float* lse, float* memory) {
  const int64_t dim = x.head_dim, width = round_up(dim, kLanes), group = x.query_heads / x.kv_heads;
  const int64_t rows = x.query_rows * group;
  float* query = memory;
  float* key_scratch = query + rows * width;
  float* value_scratch = key_scratch + kDecodeKeys * dim;
  float* scores = value_scratch + kDecodeKeys * dim;
  DecodeRow* state = reinterpret_cast<DecodeRow*>(scores + kDecodeRows * kDecodeKeys);
  const Rows queries = {x.query, nullptr, {x.query_stride[0], x.query_stride[1], x.query_stride[2]}, {0, 0, 0}, x.type};
  for (int64_t row = 0; row < rows; ++row) {
    read_row(queries, sequence, kv_head * group + row / x.query_rows, row % x.query_rows, dim, query + row * width);
    state[row] = {-__builtin_inff(), 0.0f};
  }
  std::memset(out, 0, rows * dim * sizeof(float));
  const DecodeColumns seen = decode_columns(x, sequence);
  const int64_t share = (seen.columns + splits - 1) / splits, end = smaller(seen.columns, (split + 1) * share);
  const float log2_scale = x.scale * kLog2E;
  for (int64_t column = split * share; column < end;) {
    const bool local = column >= seen.gist_columns;
    int64_t count = smaller(kDecodeKeys, (local ? end : smaller(end, seen.gist_columns)) - column);
    int64_t first = local ? seen.hull_local + column - seen.gist_columns : seen.hull_gist + column;
    int64_t sample = sequence, row_of_buffer = first;
    if (local && x.page_table) {
      count = within_page(x, first, count);
      sample = x.page_table[sequence * x.pages_per_sequence + first / x.page_size];
      row_of_buffer = first % x.page_size;
    }
    const Block key =
        read_block(local ? x.tail_key : x.gist_key, sample, kv_head, row_of_buffer, count, dim, key_scratch);
    const Block value =
        read_block(local ? x.tail_value : x.gist_value, sample, kv_head, row_of_buffer, count, dim, value_scratch);
    const DecodeBlock block = {
        key, value, count, first, local ? seen.local_begin : seen.gist_begin, local ? seen.local_end : seen.gist_end};
    int64_t row = 0;
    for (; row + kDecodeRows <= rows; row += kDecodeRows) {
      decode_rows<kDecodeRows>(x, block, row, query + row * width, log2_scale, scores, state + row, out + row * dim);
    }
    for (; row < rows; ++row) {
      decode_rows<1>(x, block, row, query + row * width, log2_scale, scores, state + row, out + row * dim);
    }
    column += count;
  }
  for (int64_t row = 0; row < rows; ++row) {
    const bool empty = state[row].maximum == -__builtin_inff() && state[row].sum == 0.0f;
    const float factor = empty ? 0.0f : 1.0f / state[row].sum;
    for (int64_t d = 0; d < dim; ++d) out[row * dim + d] *= factor;
    lse[row] = empty ? -__builtin_inff() : state[row].maximum * x.scale + __builtin_logf(state[row].sum);
  }
}

GISTKERN_NAMESPACE_END
