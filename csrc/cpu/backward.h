// Backward: one work item is a chunk of rows of one key/value head, which recomputes the probabilities tile by tile and
// adds the gradients of keys and values into accumulators of its own. Chunks are added up afterwards, in order.
#pragma once

#include "forward.h"

GISTKERN_NAMESPACE_BEGIN

// probabilities and their gradients of one block, [keys][kTileRows] each, stay in the second-level cache
constexpr int64_t kBackwardKeys = 96;
// keys whose gradients are added up together, over the strips of rows that see any of them
constexpr int64_t kGradientKeys = 2 * kBlockRows;

// Rows of head_dim floats are padded to whole strips: the micro-kernel's lanes run over head_dim here.
inline int64_t gradient_width(int64_t dim) { return round_up(dim, kStrip); }

struct BackwardScratch {
  float* rows;                                     // [kStrip][width], to transpose
  float *query, *grad_out;                         // [kTileRows][width], row by row
  float *query_strips, *grad_strips, *grad_query;  // [kTileStrips][width][kStrip]
  float *probabilities, *grad_scores;              // [kBackwardKeys][kTileRows]
  float lse[kTileRows], delta[kTileRows];
};

inline int64_t backward_scratch_floats(const AttentionArguments& x) {
  const int64_t width = gradient_width(x.head_dim);
  return kStrip * width + 5 * kTileRows * width + 2 * kBackwardKeys * kTileRows;
}

// Zeroes a strip's part of the block where the strip sees nothing: keys [from, to) of the block's rows.
inline void clear(float* block, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) {
    for (int v = 0; v < kStripVectors; ++v) store(block + i * kTileRows + v * kLanes, broadcast(0.0f));
  }
}

// Probabilities and their gradients of one strip for keys [begin, end): [keys][kTileRows], at the strip's columns.
inline void strip_gradients(const Intervals& intervals, int64_t begin, int64_t end, Block key, Block value,
                            const float* query, const float* grad_out, const float* lse, const float* delta,
                            int64_t dim, float scale, float* probabilities, float* grad_scores) {
  const int64_t count = end - begin;
  gemm<Layout::kRows, Update::kReplace>(count, key.data, key.stride, query, kStrip, dim, probabilities, kTileRows);
  gemm<Layout::kRows, Update::kReplace>(count, value.data, value.stride, grad_out, kStrip, dim, grad_scores, kTileRows);
  mask_scores(intervals, begin, end, probabilities, kTileRows);
  for (int v = 0; v < kStripVectors; ++v) {
    const Floats row_lse = load(lse + v * kLanes), row_delta = load(delta + v * kLanes);
    for (int64_t i = 0; i < count; ++i) {
      // the score rounded as it was for the LSE: where a row sees one key, p is exactly 1
      float* p = probabilities + i * kTileRows + v * kLanes;
      float* ds = grad_scores + i * kTileRows + v * kLanes;
      const Floats probability = exp2((rounded(load(p) * scale) - row_lse) * kLog2E);
      store(p, probability);
      store(ds, probability * (load(ds) - row_delta));
    }
  }
}

// Adds to the gradients of keys [begin, begin + count) what the tile's strips contribute.
// grad_value[key, d] += sum_row probabilities[key, row] * grad_out[row, d]; likewise keys, with grad_scores and query.
inline void add_key_gradients(const int64_t* from, const int64_t* to, int64_t strips, int64_t count, int64_t width,
                              const BackwardScratch& scratch, float* grad_key, float* grad_value) {
  for (int64_t first = 0; first < count; first += kGradientKeys) {
    const int64_t keys = smaller(kGradientKeys, count - first);
    int64_t strip_begin = strips, strip_end = 0;
    for (int64_t s = 0; s < strips; ++s) {
      if (from[s] < first + keys && to[s] > first) {
        strip_begin = smaller(strip_begin, s);
        strip_end = s + 1;
      }
    }
    if (strip_begin >= strip_end) continue;
    const int64_t row = strip_begin * kStrip, depth = (strip_end - strip_begin) * kStrip;
    for (int64_t d = 0; d < width; d += kStrip) {
      gemm<Layout::kRows, Update::kAdd>(keys, scratch.probabilities + first * kTileRows + row, kTileRows,
                                        scratch.grad_out + row * width + d, width, depth,
                                        grad_value + first * width + d, width);
      gemm<Layout::kRows, Update::kAdd>(keys, scratch.grad_scores + first * kTileRows + row, kTileRows,
                                        scratch.query + row * width + d, width, depth, grad_key + first * width + d,
                                        width);
    }
  }
}

// A strip of typed rows both row by row and transposed; rows that see nothing and what lies beyond head_dim are 0.
inline void read_both(const Rows& rows, const Strip& strip, int64_t sample, int64_t head, int64_t first, int64_t dim,
                      float* by_row, float* by_strip) {
  const int64_t width = gradient_width(dim);
  for (int64_t i = 0; i < kStrip; ++i) {
    const int64_t used = strip.empty[i] ? 0 : dim;
    if (used) read_row(rows, sample, head, first + i, dim, by_row + i * width);
    std::memset(by_row + i * width + used, 0, (width - used) * sizeof(float));
  }
  rows_to_strip(by_row, width, width, by_strip);
}

// delta = rowsum(grad_out * out), and the LSE with 0 on empty rows, whose keys are masked anyway.
inline void read_statistics(const AttentionArguments& x, const Strip& strip, int64_t sample, int64_t head, int64_t row,
                            const float* grad_out, float* out, float* lse, float* delta) {
  const int64_t width = gradient_width(x.head_dim);
  const int64_t first = (sample * x.query_heads + head) * x.rows + row;
  const Rows saved = {x.out, nullptr, {0, 0, x.head_dim}, {0, 0, 0}, x.query.type};
  for (int64_t i = 0; i < kStrip; ++i) {
    lse[i] = delta[i] = 0.0f;
    if (strip.empty[i]) continue;
    read_row(saved, 0, 0, first + i, x.head_dim, out);
    std::memset(out + x.head_dim, 0, (width - x.head_dim) * sizeof(float));
    Floats products = {};
    for (int64_t d = 0; d < width; d += kLanes) products += load(out + d) * load(grad_out + i * width + d);
    delta[i] = sum(products);
    lse[i] = x.lse[first + i];
  }
}

// The rows [first, first + kTileRows) of one query head, up to `row_end`.
inline void backward_tile(const AttentionArguments& x, const BackwardChunk& chunk, int64_t head, int64_t first,
                          BackwardScratch& scratch, const KeyGradients& gradients) {
  const int64_t dim = x.head_dim, width = gradient_width(dim), sample = chunk.sample, kv_head = head / x.group();
  const int64_t end = smaller(chunk.row_end, first + kTileRows), strips = (end - first + kStrip - 1) / kStrip;
  Strip strip[kTileStrips];
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t row = first + s * kStrip;
    read_strip(x, sample, row, strip[s]);
    read_both(x.query, strip[s], sample, head, row, dim, scratch.query + s * kStrip * width,
              scratch.query_strips + s * width * kStrip);
    read_both(x.grad_out, strip[s], sample, head, row, dim, scratch.grad_out + s * kStrip * width,
              scratch.grad_strips + s * width * kStrip);
    read_statistics(x, strip[s], sample, head, row, scratch.grad_out + s * kStrip * width, scratch.rows,
                    scratch.lse + s * kStrip, scratch.delta + s * kStrip);
  }
  std::memset(scratch.grad_query, 0, strips * width * kStrip * sizeof(float));
  for (const bool local : {false, true}) {
    int64_t hull_begin = INT64_MAX, hull_end = 0;
    for (int64_t s = 0; s < strips; ++s) widen_hull(local ? strip[s].local : strip[s].gist, hull_begin, hull_end);
    const int64_t origin = local ? chunk.local_begin : chunk.gist_begin;
    for (int64_t begin = hull_begin; begin < hull_end; begin += kBackwardKeys) {
      const int64_t count = smaller(kBackwardKeys, hull_end - begin);
      int64_t from[kTileStrips], to[kTileStrips];
      for (int64_t s = 0; s < strips; ++s) {
        const Intervals& intervals = local ? strip[s].local : strip[s].gist;
        from[s] = smaller(larger(intervals.hull_begin - begin, 0), count);
        to[s] = larger(smaller(intervals.hull_end - begin, count), from[s]);
        float* probabilities = scratch.probabilities + s * kStrip;
        float* grad_scores = scratch.grad_scores + s * kStrip;
        for (float* block : {probabilities, grad_scores}) {
          clear(block, 0, from[s]);
          clear(block, to[s], count);
        }
        if (from[s] == to[s]) continue;
        const Block key = block_at(local ? x.key : x.gist_key, sample, kv_head, begin + from[s]);
        const Block value = block_at(local ? x.value : x.gist_value, sample, kv_head, begin + from[s]);
        strip_gradients(intervals, begin + from[s], begin + to[s], key, value,
                        scratch.query_strips + s * width * kStrip, scratch.grad_strips + s * width * kStrip,
                        scratch.lse + s * kStrip, scratch.delta + s * kStrip, dim, x.scale,
                        probabilities + from[s] * kTileRows, grad_scores + from[s] * kTileRows);
        gemm<Layout::kColumns, Update::kAdd>(dim, key.data, key.stride, grad_scores + from[s] * kTileRows, kTileRows,
                                             to[s] - from[s], scratch.grad_query + s * width * kStrip, kStrip);
      }
      float* grad_key = (local ? gradients.local_key : gradients.gist_key) + (begin - origin) * width;
      float* grad_value = (local ? gradients.local_value : gradients.gist_value) + (begin - origin) * width;
      add_key_gradients(from, to, strips, count, width, scratch, grad_key, grad_value);
    }
  }
  const int64_t bytes = dim * element_bytes(x.query.type);
  for (int64_t s = 0; s < strips; ++s) {
    strip_to_rows(scratch.grad_query + s * width * kStrip, width, scratch.rows, width);
    const int64_t row = first + s * kStrip;
    char* to = static_cast<char*>(x.grad_query) + ((sample * x.query_heads + head) * x.rows + row) * bytes;
    for (int64_t i = 0; i < smaller(kStrip, end - row); ++i) {
      narrow(scratch.rows + i * width, x.scale, x.query.type, dim, to + i * bytes);
    }
  }
}

inline void backward_chunk(const AttentionArguments& x, const BackwardChunk& chunk, int64_t kv_head,
                           const KeyGradients& gradients, float* memory) {
  const int64_t width = gradient_width(x.head_dim);
  BackwardScratch scratch;
  scratch.rows = memory;
  scratch.query = scratch.rows + kStrip * width;
  scratch.grad_out = scratch.query + kTileRows * width;
  scratch.query_strips = scratch.grad_out + kTileRows * width;
  scratch.grad_strips = scratch.query_strips + kTileRows * width;
  scratch.grad_query = scratch.grad_strips + kTileRows * width;
  scratch.probabilities = scratch.grad_query + kTileRows * width;
  scratch.grad_scores = scratch.probabilities + kBackwardKeys * kTileRows;
  for (int64_t g = 0; g < x.group(); ++g) {
    for (int64_t row = chunk.row_begin; row < chunk.row_end; row += kTileRows) {
      backward_tile(x, chunk, kv_head * x.group() + g, row, scratch, gradients);
    }
  }
}

// Row `row` of the gradient of one buffer: the sum over the chunks that hold it, in order, as elements of `type`.
inline void reduce_row(const float* const* parts, int64_t count, float factor, ElementType type, int64_t dim,
                       float* scratch, void* to) {
  const int64_t width = gradient_width(dim);
  for (int64_t d = 0; d < width; d += kLanes) {
    Floats total = {};
    for (int64_t part = 0; part < count; ++part) total += load(parts[part] + d);
    store(scratch + d, total);
  }
  narrow(scratch, factor, type, dim, to);
}

GISTKERN_NAMESPACE_END
