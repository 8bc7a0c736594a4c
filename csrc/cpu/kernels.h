// The kernels of one instruction set, as a table of functions.
#pragma once

#include "arguments.h"

namespace gistkern::cpu {

struct Kernels {
  const char* name;

  int64_t (*forward_items)(const AttentionArguments&);
  int64_t (*forward_scratch_floats)(const AttentionArguments&);
  void (*forward_item)(const AttentionArguments&, int64_t item, float* scratch);

  int64_t (*gradient_width)(int64_t head_dim);
  int64_t (*backward_scratch_floats)(const AttentionArguments&);
  void (*backward_chunk)(const AttentionArguments&, const BackwardChunk&, int64_t kv_head, const KeyGradients&,
                         float* scratch);
  void (*reduce_row)(const float* const* parts, int64_t count, float factor, ElementType, int64_t head_dim,
                     float* scratch, void* to);

  int64_t (*decode_scratch_floats)(const DecodeArguments&);
  void (*decode_item)(const DecodeArguments&, int64_t sequence, int64_t kv_head, int64_t split, int64_t splits,
                      float* out, float* lse, float* scratch);
  void (*compact_row)(const CompactArguments&, int64_t sample, int64_t kv_head, int64_t column, float* scratch);
  void (*read_row)(const Rows&, int64_t sample, int64_t head, int64_t row, int64_t head_dim, float* to);
  void (*narrow)(const float* from, float factor, ElementType, int64_t count, void* to);
};

// One per translation unit of kernels.cpp (build_extension.py lists them); avx2 and avx512 exist on x86-64 only.
namespace baseline {
extern const Kernels kKernels;
}
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}

}  // namespace gistkern::cpu
