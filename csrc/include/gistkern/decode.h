// Decoding over compact gist rows and a tail: arguments and launcher, with a C ABI.
#pragma once

#include "gistkern/types.h"

namespace gistkern {

// Query row i (0 <= i < query_rows <= 8) of sequence b sees
//   gist rows  [gist_begin[b, i], gist_end[b, i])  of gist_key / gist_value, and
//   tail rows  [local_begin[b, i], tail_length[b] - query_rows + i]  (itself included).
// The gist rows may be one pool for all sequences (stride[0] = 0), in which sequences may share a document's rows.
// The tail may be paged: row r of sequence b is then row r % page_size of sample page_table[b, r / page_size].
// Every length is read on the device; the capacities bound them and only choose the launch.
struct DecodeArguments {
  const void* query = nullptr;  // [batch, query_heads, query_rows, head_dim] by stride, head_dim contiguous
  int64_t query_stride[3] = {0, 0, 0};
  void* out = nullptr;   // like query, contiguous
  float* lse = nullptr;  // [batch, query_heads, query_rows], contiguous, natural log, -inf on rows that see nothing
  ElementType type = ElementType::kBFloat16;  // of query and out: kFloat32, kFloat16 or kBFloat16

  Rows gist_key, gist_value, tail_key, tail_value;  // each of the query's type, or quantized with scales

  const int32_t* gist_begin = nullptr;   // [batch, query_rows] by interval_stride
  const int32_t* gist_end = nullptr;     // likewise
  const int32_t* local_begin = nullptr;  // likewise; null: 0
  int64_t interval_stride[2] = {0, 0};   // of the three vectors above: (sequence, query row)
  const int32_t* tail_length = nullptr;  // [batch], the new rows included; null: tail_capacity for every sequence
  const int32_t* page_table = nullptr;   // [batch, pages_per_sequence]; null: the tail is not paged
  int32_t pages_per_sequence = 0;
  int32_t page_size = 0;

  int32_t batch = 0, query_heads = 0, kv_heads = 0, query_rows = 0, head_dim = 0;
  int32_t gist_capacity = 0, tail_capacity = 0;  // upper bounds on the rows any sequence sees
  int32_t multiprocessors = 0;                   // of the device, for the number of splits
  float scale = 1.0f;                            // of the scores
};

enum class DecodeVariant : int32_t { kAutomatic = 0, kSimt = 1, kTensorCore = 2 };

// What a launch that is split needs beside its arguments. The launcher asks for it once it knows how much: a launch
// that is not split asks for nothing.
struct DecodeScratch {
  // Device memory for so many floats, free until the launch has run.
  float* (*workspace)(void* context, int64_t floats) = nullptr;
  void* context = nullptr;
};

// Null, or why `variant` cannot serve these arguments (a static string for an error message).
extern "C" const char* gistkern_decode_refuses(const DecodeArguments* arguments, DecodeVariant variant);

// Launches one kernel on `stream` (a cudaStream_t). Returns null, or an error message with static storage.
extern "C" const char* gistkern_decode(const DecodeArguments* arguments, DecodeVariant variant,
                                       const DecodeScratch* scratch, void* stream);

}  // namespace gistkern
