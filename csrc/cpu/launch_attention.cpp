// Forward and backward of the op on CPU: chunks, accumulators, and the order in which they are added up.
#include <algorithm>
#include <vector>

#include "instruction_set.h"
#include "launch.h"
#include "plain.h"
#include "scratch.h"

namespace gistkern::cpu {
namespace {

// Enough chunks for many threads where heads are few, but no more: each holds accumulators for all it sees.
constexpr int64_t kWantedItems = 32, kMaximumChunks = 8, kMinimumChunkRows = 512;
constexpr int64_t kReducedRows = 64;  // rows of a gradient that one item adds up

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t chunk_rows(const AttentionArguments& x) {
  const int64_t wanted = ceil_div(kWantedItems, x.batch * x.kv_heads);
  const int64_t chunks = std::max<int64_t>(1, std::min({wanted, kMaximumChunks, x.rows / kMinimumChunkRows}));
  return ceil_div(ceil_div(x.rows, chunks), kChunkRows) * kChunkRows;
}

// The keys that rows [begin, end) of a sample see.
BackwardChunk chunk_of(const AttentionArguments& x, int64_t sample, int64_t begin, int64_t end) {
  BackwardChunk chunk{sample, begin, end, x.local_rows, 0, x.gist_rows, 0};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = sample * x.rows + row, local_end = x.tail() + row + 1;
    if (x.local_begin[at] < local_end) {
      chunk.local_begin = std::min<int64_t>(chunk.local_begin, x.local_begin[at]);
      chunk.local_end = local_end;
    }
    if (x.gist_begin[at] < x.gist_end[at]) {
      chunk.gist_begin = std::min<int64_t>(chunk.gist_begin, x.gist_begin[at]);
      chunk.gist_end = std::max<int64_t>(chunk.gist_end, x.gist_end[at]);
    }
  }
  chunk.local_begin = std::min(chunk.local_begin, chunk.local_end);
  chunk.gist_begin = std::min(chunk.gist_begin, chunk.gist_end);
  return chunk;
}

// One chunk of one key/value head, and where its accumulators are.
struct Part {
  BackwardChunk chunk;
  int64_t kv_head, offset;
};

struct Accumulators {
  const Part& part;
  float* memory;
  int64_t width;

  int64_t local_floats() const { return (part.chunk.local_end - part.chunk.local_begin) * width; }
  int64_t gist_floats() const { return (part.chunk.gist_end - part.chunk.gist_begin) * width; }
  int64_t floats() const { return 2 * (local_floats() + gist_floats()); }
  KeyGradients gradients() const {
    float* first = memory + part.offset;
    return {first, first + local_floats(), first + 2 * local_floats(), first + 2 * local_floats() + gist_floats()};
  }
};

}  // namespace

const char* attention_forward(const AttentionArguments& arguments, const Pool& pool) {
  const Chosen& chosen = chosen_kernels();
  if (chosen.error) return chosen.error;
  const Kernels& kernels = *chosen.kernels;
  AttentionArguments x = arguments;
  const PlainKeys plain(x, kernels, pool);
  if (plain.failed()) return kOutOfMemory;
  advise_huge_pages(x.out, x.batch * x.query_heads * x.rows * x.head_dim * element_bytes(x.query.type));
  const bool done = for_items(pool, kernels.forward_items(x), kernels.forward_scratch_floats(x),
                              [&](int64_t item, float* scratch) { kernels.forward_item(x, item, scratch); });
  return done ? nullptr : kOutOfMemory;
}

const char* attention_backward(const AttentionArguments& arguments, const Pool& pool) {
  const Chosen& chosen = chosen_kernels();
  if (chosen.error) return chosen.error;
  const Kernels& kernels = *chosen.kernels;
  AttentionArguments x = arguments;
  const PlainKeys plain(x, kernels, pool);
  if (plain.failed()) return kOutOfMemory;
  const int64_t query_bytes = x.batch * x.query_heads * x.rows * x.head_dim * element_bytes(x.query.type);
  const int64_t key_bytes = x.batch * x.kv_heads * x.local_rows * x.head_dim * element_bytes(x.query.type);
  advise_huge_pages(x.grad_query, query_bytes);
  advise_huge_pages(x.grad_key, key_bytes);
  advise_huge_pages(x.grad_value, key_bytes);
  const int64_t width = kernels.gradient_width(x.head_dim), rows = chunk_rows(x), chunks = ceil_div(x.rows, rows);

  // parts of one sample and head follow each other, the last rows (which see most) first: they take longest
  std::vector<Part> parts;
  int64_t floats = 0;
  for (int64_t sample = 0; sample < x.batch; ++sample) {
    for (int64_t head = 0; head < x.kv_heads; ++head) {
      for (int64_t c = 0; c < chunks; ++c) {
        parts.push_back({chunk_of(x, sample, c * rows, std::min(x.rows, (c + 1) * rows)), head, floats});
        floats += Accumulators{parts.back(), nullptr, width}.floats();
      }
    }
  }
  const Scratch memory(floats);
  if (!memory.data()) return kOutOfMemory;
  const int64_t heads = x.batch * x.kv_heads;
  bool done = for_items(pool, heads * chunks, kernels.backward_scratch_floats(x), [&](int64_t item, float* scratch) {
    const Part& part = parts[item % heads * chunks + chunks - 1 - item / heads];
    const Accumulators accumulators{part, memory.data(), width};
    std::fill_n(memory.data() + part.offset, accumulators.floats(), 0.0f);
    kernels.backward_chunk(x, part.chunk, part.kv_head, accumulators.gradients(), scratch);
  });
  if (!done) return kOutOfMemory;

  const int64_t local_blocks = ceil_div(x.local_rows, kReducedRows);
  const int64_t blocks = local_blocks + ceil_div(x.gist_rows, kReducedRows);
  done = for_items(pool, heads * blocks, width, [&](int64_t item, float* scratch) {
    const int64_t head = item / blocks, block = item % blocks;
    const bool local = block < local_blocks;
    const int64_t buffer_rows = local ? x.local_rows : x.gist_rows;
    const int64_t first = (local ? block : block - local_blocks) * kReducedRows;
    const ElementType type = x.query.type;
    const int64_t bytes = x.head_dim * element_bytes(type);
    for (int64_t row = first; row < std::min(buffer_rows, first + kReducedRows); ++row) {
      const float *key_parts[kMaximumChunks], *value_parts[kMaximumChunks];
      int64_t count = 0;
      for (int64_t c = 0; c < chunks; ++c) {
        const Part& part = parts[head * chunks + c];
        const int64_t begin = local ? part.chunk.local_begin : part.chunk.gist_begin;
        const int64_t end = local ? part.chunk.local_end : part.chunk.gist_end;
        if (row < begin || row >= end) continue;
        const KeyGradients gradients = Accumulators{part, memory.data(), width}.gradients();
        key_parts[count] = (local ? gradients.local_key : gradients.gist_key) + (row - begin) * width;
        value_parts[count++] = (local ? gradients.local_value : gradients.gist_value) + (row - begin) * width;
      }
      const int64_t to = (head * buffer_rows + row) * bytes;
      char* grad_key = static_cast<char*>(local ? x.grad_key : x.grad_gist_key) + to;
      char* grad_value = static_cast<char*>(local ? x.grad_value : x.grad_gist_value) + to;
      kernels.reduce_row(key_parts, count, x.scale, type, x.head_dim, scratch, grad_key);
      kernels.reduce_row(value_parts, count, 1.0f, type, x.head_dim, scratch, grad_value);
    }
  });
  return done ? nullptr : kOutOfMemory;
}

const char* instruction_set(const char** error) {
  const Chosen& chosen = chosen_kernels();
  *error = chosen.error;
  return chosen.kernels ? chosen.kernels->name : nullptr;
}

}  // namespace gistkern::cpu
