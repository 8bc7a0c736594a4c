// Compaction on CPU.
#include "instruction_set.h"
#include "launch.h"
#include "scratch.h"

namespace gistkern::cpu {

const char* compact(const CompactArguments& x, const Pool& pool) {
  const Chosen& chosen = chosen_kernels();
  if (chosen.error) return chosen.error;
  const Kernels& kernels = *chosen.kernels;
  const int64_t columns = static_cast<int64_t>(x.past_rows) + x.gathered_rows;
  const bool done =
      for_items(pool, static_cast<int64_t>(x.batch) * x.kv_heads, x.head_dim, [&](int64_t item, float* scratch) {
        for (int64_t column = 0; column < columns; ++column) {
          kernels.compact_row(x, item / x.kv_heads, item % x.kv_heads, column, scratch);
        }
      });
  return done ? nullptr : kOutOfMemory;
}

}  // namespace gistkern::cpu
