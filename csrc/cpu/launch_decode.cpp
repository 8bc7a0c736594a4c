// Decoding on CPU: how columns are split among work items, and the merge of the splits.
#include <algorithm>
#include <cmath>
#include <limits>

#include "instruction_set.h"
#include "launch.h"
#include "scratch.h"

namespace gistkern::cpu {
namespace {

// Fewer columns than this are not worth a merge; more items than this keep no more threads busy.
constexpr int64_t kSplitColumns = 1024, kWantedItems = 64;

int64_t split_count(const DecodeArguments& x) {
  const int64_t columns = static_cast<int64_t>(x.gist_capacity) + x.tail_capacity;
  const int64_t items = std::max<int64_t>(1, static_cast<int64_t>(x.batch) * x.kv_heads);
  const int64_t useful = (kWantedItems + items - 1) / items;
  return std::max<int64_t>(1, std::min(useful, columns / kSplitColumns));
}

}  // namespace

const char* decode(const DecodeArguments& x, const Pool& pool) {
  const Chosen& chosen = chosen_kernels();
  if (chosen.error) return chosen.error;
  const Kernels& kernels = *chosen.kernels;
  const int64_t splits = split_count(x), group = x.query_heads / x.kv_heads, rows = x.query_rows * group;
  const int64_t units = static_cast<int64_t>(x.batch) * x.kv_heads, dim = x.head_dim;
  const Scratch partial(units * splits * rows * (dim + 1));
  if (!partial.data()) return kOutOfMemory;
  float* out = partial.data();                     // [units][splits][rows][dim]
  float* lse = out + units * splits * rows * dim;  // [units][splits][rows]

  bool done = for_items(pool, units * splits, kernels.decode_scratch_floats(x), [&](int64_t item, float* scratch) {
    const int64_t unit = item / splits;
    kernels.decode_item(x, unit / x.kv_heads, unit % x.kv_heads, item % splits, splits, out + item * rows * dim,
                        lse + item * rows, scratch);
  });
  if (!done) return kOutOfMemory;

  // docs/concepts/numerics.md, "Merging partial attention"; into the first split's rows
  done = for_items(pool, units, 0, [&](int64_t unit, float*) {
    for (int64_t row = 0; row < rows; ++row) {
      float* total = out + (unit * splits * rows + row) * dim;
      float* total_lse = lse + unit * splits * rows + row;
      float largest = -std::numeric_limits<float>::infinity(), sum = 0.0f;
      bool nan = false;
      for (int64_t s = 0; s < splits; ++s) {
        largest = std::max(largest, total_lse[s * rows]);
        nan |= std::isnan(total_lse[s * rows]);
      }
      const bool empty = std::isinf(largest) && largest < 0 && !nan;
      for (int64_t s = 0; s < splits && !empty; ++s) sum += std::exp(total_lse[s * rows] - largest);
      const float merged = empty ? largest : largest + std::log(sum);
      for (int64_t d = 0; d < dim && splits > 1 && !empty; ++d) {
        float value = 0.0f;
        for (int64_t s = 0; s < splits; ++s) {
          const float weight = std::exp(total_lse[s * rows] - merged);
          if (weight != 0.0f) value += weight * total[s * rows * dim + d];
        }
        total[d] = value;
      }
      if (splits > 1) *total_lse = merged;
      const int64_t head = unit % x.kv_heads * group + row / x.query_rows;
      const int64_t to = (unit / x.kv_heads * x.query_heads + head) * x.query_rows + row % x.query_rows;
      kernels.narrow(total, 1.0f, x.type, dim, static_cast<char*>(x.out) + to * dim * element_bytes(x.type));
      x.lse[to] = *total_lse;
    }
  });
  return done ? nullptr : kOutOfMemory;
}

}  // namespace gistkern::cpu
