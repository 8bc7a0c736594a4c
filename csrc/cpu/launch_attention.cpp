// Forward and backward of the op on CPU: chunks, accumulators, and the order in which they are added up.
#include <algorithm>
#include <utility>
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

// (local row, compact row) for every compact row of a sample that was gathered from a local row, in that order.
using Gathered = std::vector<std::pair<int64_t, int64_t>>;

Gathered gathered_rows(const AttentionArguments& x, int64_t sample) {
  Gathered gathered;
  for (int64_t column = x.past_rows; x.gather && column < x.gist_rows; ++column) {
    const int64_t at = sample * x.gather_stride[0] + (column - x.past_rows) * x.gather_stride[1];
    if (x.gather[at] >= 0) gathered.emplace_back(x.gather[at], column);
  }
  if (!std::is_sorted(gathered.begin(), gathered.end())) std::sort(gathered.begin(), gathered.end());
  return gathered;
}

// The most compact rows that were gathered from one local row.
int64_t most_gathered(const std::vector<Gathered>& samples) {
  int64_t most = 0;
  for (const Gathered& gathered : samples) {
    int64_t count = 0;
    for (size_t i = 0; i < gathered.size(); ++i) {
      count = i > 0 && gathered[i].first == gathered[i - 1].first ? count + 1 : 1;
      most = std::max(most, count);
    }
  }
  return most;
}

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

  // each row of a gradient is rounded once: a local row's sum holds the compact rows gathered from it
  std::vector<Gathered> gathered;
  for (int64_t sample = 0; sample < x.batch; ++sample) gathered.push_back(gathered_rows(x, sample));
  const int64_t most_parts = chunks * (1 + most_gathered(gathered));
  const int64_t pointer_floats = 2 * most_parts * static_cast<int64_t>(sizeof(void*)) / 4;
  const int64_t local_blocks = ceil_div(x.local_rows, kReducedRows);
  const int64_t blocks = local_blocks + ceil_div(x.past_rows, kReducedRows);
  done = for_items(pool, heads * blocks, width + pointer_floats, [&](int64_t item, float* scratch) {
    const int64_t head = item / blocks, block = item % blocks;
    const bool local = block < local_blocks;
    const int64_t buffer_rows = local ? x.local_rows : x.past_rows;
    const int64_t first = (local ? block : block - local_blocks) * kReducedRows;
    const ElementType type = x.query.type;
    const int64_t bytes = x.head_dim * element_bytes(type);
    const float** key_parts = reinterpret_cast<const float**>(scratch + width);
    const float** value_parts = key_parts + most_parts;
    int64_t count = 0;
    const auto add = [&](bool of_local, int64_t row) {
      for (int64_t c = 0; c < chunks; ++c) {
        const Part& part = parts[head * chunks + c];
        const int64_t begin = of_local ? part.chunk.local_begin : part.chunk.gist_begin;
        const int64_t end = of_local ? part.chunk.local_end : part.chunk.gist_end;
        if (row < begin || row >= end) continue;
        const KeyGradients gradients = Accumulators{part, memory.data(), width}.gradients();
        key_parts[count] = (of_local ? gradients.local_key : gradients.gist_key) + (row - begin) * width;
        value_parts[count++] = (of_local ? gradients.local_value : gradients.gist_value) + (row - begin) * width;
      }
    };
    const Gathered& listed = gathered[head / x.kv_heads];
    auto next = std::lower_bound(listed.begin(), listed.end(), std::pair<int64_t, int64_t>{first, 0});
    for (int64_t row = first; row < std::min(buffer_rows, first + kReducedRows); ++row) {
      count = 0;
      add(local, row);
      for (; local && next != listed.end() && next->first == row; ++next) add(false, next->second);
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
