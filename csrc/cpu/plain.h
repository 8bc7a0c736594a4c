// Keys and values as the kernels read them: fp32, the rows of a head side by side. Rows of another type are converted
// once per call; so are rows that lie far apart (a head of [batch, rows, heads, head_dim]), which would share few sets
// of the caches every time they are read.
#pragma once

#include "instruction_set.h"
#include "scratch.h"

namespace gistkern::cpu {

inline bool is_plain(const Rows& rows, int64_t head_dim) {
  return rows.type == ElementType::kFloat32 && rows.stride[2] == head_dim;
}

// Puts plain copies into the arguments where they are needed, and keeps them as long as it lives.
class PlainKeys {
 public:
  PlainKeys(AttentionArguments& x, const Kernels& kernels, const Pool& pool)
      : key_(floats(x, x.key, x.local_rows)),
        value_(floats(x, x.value, x.local_rows)),
        gist_key_(floats(x, x.gist_key, x.gist_rows)),
        gist_value_(floats(x, x.gist_value, x.gist_rows)) {
    convert(x, x.key, x.local_rows, key_, kernels, pool);
    convert(x, x.value, x.local_rows, value_, kernels, pool);
    convert(x, x.gist_key, x.gist_rows, gist_key_, kernels, pool);
    convert(x, x.gist_value, x.gist_rows, gist_value_, kernels, pool);
  }
  bool failed() const { return failed_; }

 private:
  static int64_t floats(const AttentionArguments& x, const Rows& rows, int64_t count) {
    return is_plain(rows, x.head_dim) ? 0 : x.batch * x.kv_heads * count * x.head_dim;
  }

  void convert(const AttentionArguments& x, Rows& rows, int64_t count, const Scratch& to, const Kernels& kernels,
               const Pool& pool) {
    if (is_plain(rows, x.head_dim)) return;
    failed_ |= !to.data();
    if (failed_) return;
    for_items(pool, x.batch * x.kv_heads, 0, [&](int64_t item, float*) {
      float* target = to.data() + item * count * x.head_dim;
      for (int64_t row = 0; row < count; ++row) {
        kernels.read_row(rows, item / x.kv_heads, item % x.kv_heads, row, x.head_dim, target + row * x.head_dim);
      }
    });
    const int64_t head = count * x.head_dim;
    rows = {to.data(), nullptr, {x.kv_heads * head, head, x.head_dim}, {0, 0, 0}, ElementType::kFloat32};
  }

  Scratch key_, value_, gist_key_, gist_value_;
  bool failed_ = false;
};

}  // namespace gistkern::cpu
