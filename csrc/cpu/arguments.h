// What the CPU kernels are called with. Plain C++; the CUDA decode and compaction structs serve the CPU too.
#pragma once

#include <cstdint>

#include "gistkern/compact.h"
#include "gistkern/decode.h"
#include "gistkern/types.h"

namespace gistkern::cpu {

// Query row i of sample b sees gist rows [gist_begin[b, i], gist_end[b, i]) and local rows
// [local_begin[b, i], local_rows - rows + i].
struct AttentionArguments {
  Rows query;                 // [batch, query_heads, rows, head_dim]
  Rows key, value;            // [batch, kv_heads, local_rows, head_dim]; the kernels see fp32, side by side (plain.h)
  Rows gist_key, gist_value;  // [batch, kv_heads, gist_rows, head_dim]; likewise
  const int32_t* gist_begin = nullptr;  // [batch, rows], contiguous; so are the next two
  const int32_t* gist_end = nullptr;
  const int32_t* local_begin = nullptr;
  void* out = nullptr;   // like query, contiguous; read by the backward
  float* lse = nullptr;  // [batch, query_heads, rows], natural log; likewise
  int64_t batch = 0, query_heads = 0, kv_heads = 0, rows = 0, local_rows = 0, gist_rows = 0, head_dim = 0;
  float scale = 1.0f;

  // backward only
  Rows grad_out;                                                           // like query
  void *grad_query = nullptr, *grad_key = nullptr, *grad_value = nullptr;  // like query, key, value, contiguous
  void *grad_gist_key = nullptr, *grad_gist_value = nullptr;  // [batch, kv_heads, past_rows, head_dim], contiguous
  // The last compact rows were gathered from the local rows that this lists, and their gradients are added to those of
  // these: [batch, gist_rows - past_rows], -1 for a filler. Null: past_rows is gist_rows.
  const int64_t* gather = nullptr;
  int64_t gather_stride[2] = {0, 0};
  int64_t past_rows = 0;

  int64_t group() const { return query_heads / kv_heads; }
  int64_t tail() const { return local_rows - rows; }
};

// Chunks begin at multiples of this, the height of every instruction set's tiles.
constexpr int64_t kChunkRows = 64;

// A stretch of rows of one sample, with the local and gist keys that any of its rows sees. Which rows form a chunk
// depends on sizes alone, so that sums have the same order on any number of threads.
struct BackwardChunk {
  int64_t sample, row_begin, row_end, local_begin, local_end, gist_begin, gist_end;
};

// A chunk's fp32 accumulators, [local_end - local_begin][gradient width] or [gist_end - gist_begin][gradient width].
struct KeyGradients {
  float *local_key, *local_value, *gist_key, *gist_value;
};

}  // namespace gistkern::cpu
