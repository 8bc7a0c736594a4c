// Compaction: gather the gist rows of one layer's keys and values in one launch, optionally quantizing them.
#pragma once

#include "gistkern/types.h"

namespace gistkern {

// Compact row c of sample b, for c in [0, past_rows + gathered_rows):
//   c < past_rows: row c of past_key / past_value;
//   otherwise:     local row gather[b, c - past_rows] of key / value; -1 is a filler.
// Without `slot` it is written to row c of sample b of out_key / out_value (a filler becomes zeros). With `slot`
// (int64 [batch, past_rows + gathered_rows], contiguous) to row slot[b, c] of sample 0: a pool of documents; a filler,
// or a negative slot, is then not written at all.
// Keys and values are copied bit for bit where the types agree. A quantized output gets scale = max |x| / 127 (int8) or
// / 448 (e4m3) per row and head, elements rounded to nearest even; a row of zeros has scale 0.
struct CompactArguments {
  Rows key, value;            // [batch, kv_heads, local_rows, head_dim]
  Rows past_key, past_value;  // data null where past_rows is 0
  const int64_t* gather = nullptr;
  int64_t gather_stride[2] = {0, 0};
  const int64_t* slot = nullptr;

  // outputs by stride, as Rows, but written; scales only for a quantized type
  void* out_key = nullptr;
  void* out_value = nullptr;
  float* out_key_scale = nullptr;
  float* out_value_scale = nullptr;
  int64_t out_stride[3] = {0, 0, 0};        // of both
  int64_t out_scale_stride[3] = {0, 0, 0};  // of both
  ElementType out_type = ElementType::kBFloat16;

  int32_t batch = 0, kv_heads = 0, head_dim = 0, past_rows = 0, gathered_rows = 0;
};

// Launches on `stream` (a cudaStream_t). Returns null, or an error message with static storage.
extern "C" const char* gistkern_compact(const CompactArguments* arguments, void* stream);

}  // namespace gistkern
