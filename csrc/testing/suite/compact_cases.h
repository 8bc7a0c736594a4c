// Compaction cases: every byte of the outputs is compared, those that nothing may write included.
#pragma once

#include <algorithm>
#include <vector>

#include "gistkern/compact.h"
#include "suite/buffer.h"
#include "suite/case.h"

namespace gistkern::suite {

struct CompactSpec {
  ElementType type = ElementType::kBFloat16;      // of key and value
  ElementType out_type = ElementType::kBFloat16;  // of the outputs and the past rows
  int batch = 2, kv_heads = 3, head_dim = 64, past_rows = 4, gathered_rows = 21, local_rows = 40;
  bool with_slot = false;
  bool ties = false;           // values half-way between codes, and a row of zeros
  bool gather_by_row = false;  // gather [gathered_rows, batch] instead of [batch, gathered_rows]
  Layout rows, out;

  int compact_rows() const { return past_rows + gathered_rows; }
  std::string name() const {
    std::string result = text("compact-%s-%s-B%d-H%d-D%d-P%d-G%d", name_of(type), name_of(out_type), batch, kv_heads,
                              head_dim, past_rows, gathered_rows);
    if (with_slot) result += "-slot";
    if (ties) result += "-ties";
    if (gather_by_row) result += "-byrow";
    if (rows.rows_first) result += "-rowsfirst";
    if (rows.gap > 0 || out.gap > 0) result += text("-gap%d-%d", rows.gap, out.gap);
    if (rows.offset > 0 || out.offset > 0) result += text("-offset%d-%d", rows.offset, out.offset);
    return result;
  }
};

struct CompactProblem {
  CompactProblem(const CompactSpec& spec, Generator& generator)
      : spec(spec),
        key(spec.type, spec.batch, spec.kv_heads, spec.local_rows, spec.head_dim, spec.rows),
        value(spec.type, spec.batch, spec.kv_heads, spec.local_rows, spec.head_dim, spec.rows),
        past_key(spec.out_type, spec.batch, spec.kv_heads, spec.past_rows, spec.head_dim, spec.out),
        past_value(spec.out_type, spec.batch, spec.kv_heads, spec.past_rows, spec.head_dim, spec.out),
        out_key(make_out()),
        out_value(make_out()),
        gather(size_t(spec.batch) * spec.gathered_rows),
        slot(size_t(spec.batch) * spec.compact_rows()) {
    for (int b = 0; b < spec.batch; ++b) {
      for (int row = 0; row < spec.past_rows; ++row) {
        past_key.put_random(b, row, generator);
        past_value.put_random(b, row, generator);
      }
      for (int c = 0; c < spec.gathered_rows; ++c) {
        const bool filler = c % 7 == 3, repeated = c % 5 == 4;
        const int row = between(generator, 0, spec.local_rows - 1);
        gather[gathered(b, c)] = filler ? -1 : repeated ? gather[gathered(b, 0)] : row;
      }
      // all other rows stay NaN
      for (int c = 0; c < spec.gathered_rows; ++c) {
        const int64_t row = gather[gathered(b, c)];
        if (row >= 0) put_local(b, static_cast<int>(row), generator);
      }
    }
    if (spec.with_slot) draw_slots(generator);
  }

  int64_t gather_stride(int axis) const {
    if (spec.gather_by_row) return axis == 0 ? 1 : spec.batch;
    return axis == 0 ? spec.gathered_rows : 1;
  }
  size_t gathered(int sample, int c) const { return sample * gather_stride(0) + c * gather_stride(1); }

  CompactArguments arguments() {
    CompactArguments a;
    a.key = key.view(), a.value = value.view();
    if (spec.past_rows > 0) a.past_key = past_key.view(), a.past_value = past_value.view();
    a.gather = gather.get();
    for (int axis : {0, 1}) a.gather_stride[axis] = gather_stride(axis);
    if (spec.with_slot) a.slot = slot.get();
    const Rows out = out_key.view();
    a.out_key = out_key.bytes().size() > 0 ? out_key.address(0, 0, 0) : nullptr;
    a.out_value = out_value.bytes().size() > 0 ? out_value.address(0, 0, 0) : nullptr;
    std::copy_n(out.stride, 3, a.out_stride);
    if (is_code(spec.out_type)) {
      a.out_key_scale = out_key.scale(0, 0, 0), a.out_value_scale = out_value.scale(0, 0, 0);
      std::copy_n(out.scale_stride, 3, a.out_scale_stride);
    }
    a.out_type = spec.out_type;
    a.batch = spec.batch, a.kv_heads = spec.kv_heads, a.head_dim = spec.head_dim;
    a.past_rows = spec.past_rows, a.gathered_rows = spec.gathered_rows;
    return a;
  }

  const CompactSpec spec;
  RowBuffer key, value, past_key, past_value, out_key, out_value;
  Array<int64_t> gather, slot;

 private:
  // a pool has rows that nothing is written to
  RowBuffer make_out() const {
    if (!spec.with_slot) {
      return {spec.out_type, spec.batch, spec.kv_heads, spec.compact_rows(), spec.head_dim, spec.out};
    }
    return {spec.out_type, 1, spec.kv_heads, 2 * spec.batch * spec.compact_rows(), spec.head_dim, spec.out};
  }

  void put_local(int b, int row, Generator& generator) {
    if (!spec.ties) {
      key.put_random(b, row, generator);
      value.put_random(b, row, generator);
      return;
    }
    // the largest value is the largest code's: the scale is exactly 1
    for (int head = 0; head < spec.kv_heads; ++head) {
      std::vector<float> values(spec.head_dim, 0.0f);
      if (row % 4 != 0) {
        for (float& x : values) x = between(generator, -60, 60) + 0.5f;
        values[row % spec.head_dim] = static_cast<float>(largest_code(spec.out_type));
      }
      key.put(b, head, row, values);
      value.put(b, head, row, values);
    }
  }

  void draw_slots(Generator& generator) {
    std::vector<int64_t> places(2 * slot.size() / sizeof(int64_t));
    for (size_t i = 0; i < places.size(); ++i) places[i] = static_cast<int64_t>(i);
    std::shuffle(places.begin(), places.end(), generator);
    for (size_t i = 0; i < places.size() / 2; ++i) slot[i] = i % 6 == 5 ? -1 : places[i];
  }
};

// What a row becomes: bits where the types agree, the nearest codes otherwise. `from` null: a filler.
inline void put_expected(RowBuffer& out, int sample, int head, int out_row, const RowBuffer* from, int b, int row) {
  const int bytes = element_bytes(out.type());
  if (from == nullptr) {
    std::memset(out.address(sample, head, out_row), 0, size_t(out.dim) * bytes);
    if (is_code(out.type())) *out.scale(sample, head, out_row) = 0.0f;
  } else if (from->type() == out.type()) {
    std::memcpy(out.address(sample, head, out_row), from->address(b, head, row), size_t(out.dim) * bytes);
    if (is_code(out.type())) *out.scale(sample, head, out_row) = *from->scale(b, head, row);
  } else {
    std::vector<float> values(out.dim);
    for (int d = 0; d < out.dim; ++d) values[d] = static_cast<float>(from->value(b, head, row, d));
    out.put(sample, head, out_row, values);
  }
}

// Between the rows of two buffers, one of which may be too large for a look at every byte.
inline std::string first_difference(RowBuffer& got, RowBuffer& expected, const char* what) {
  const size_t bytes = size_t(got.dim) * element_bytes(got.type());
  for (int sample = 0; sample < got.samples; ++sample) {
    for (int head = 0; head < got.heads; ++head) {
      for (int row = 0; row < got.rows; ++row) {
        if (std::memcmp(got.address(sample, head, row), expected.address(sample, head, row), bytes) != 0) {
          return text("%s: sample %d head %d row %d differs", what, sample, head, row);
        }
      }
    }
  }
  return "";
}

inline std::string first_difference(Bytes& got, Bytes& expected, const char* what) {
  for (size_t i = 0; i < got.size() && !got.is_sparse(); ++i) {
    if (got.data()[i] != expected.data()[i]) {
      return text("%s: byte %zu is 0x%02x, expected 0x%02x", what, i, got.data()[i] & 0xff, expected.data()[i] & 0xff);
    }
  }
  return "";
}

inline Outcome run_compact(const CompactSpec& spec, uint64_t seed) {
  Generator generator(seed);
  CompactProblem problem(spec, generator);
  Generator again(seed);
  CompactProblem expected(spec, again);
  const CompactArguments arguments = problem.arguments();
  if (const char* error = gistkern_compact(&arguments, nullptr)) return failed(error);
  for (int b = 0; b < spec.batch; ++b) {
    for (int c = 0; c < spec.compact_rows(); ++c) {
      const int64_t local = c < spec.past_rows ? 0 : problem.gather[problem.gathered(b, c - spec.past_rows)];
      const int64_t row = spec.with_slot ? problem.slot[b * spec.compact_rows() + c] : c;
      if (spec.with_slot && (row < 0 || local < 0)) continue;
      const int sample = spec.with_slot ? 0 : b;
      for (int head = 0; head < spec.kv_heads; ++head) {
        const auto put = [&](RowBuffer& out, const RowBuffer& past, const RowBuffer& fresh) {
          const RowBuffer* from = c < spec.past_rows ? &past : local < 0 ? nullptr : &fresh;
          put_expected(out, sample, head, static_cast<int>(row), from, b,
                       static_cast<int>(c < spec.past_rows ? c : local));
        };
        put(expected.out_key, expected.past_key, expected.key);
        put(expected.out_value, expected.past_value, expected.value);
      }
    }
  }
  for (const std::string& difference :
       {first_difference(problem.out_key, expected.out_key, "key"),
        first_difference(problem.out_value, expected.out_value, "value"),
        first_difference(problem.out_key.bytes(), expected.out_key.bytes(), "key"),
        first_difference(problem.out_value.bytes(), expected.out_value.bytes(), "value"),
        first_difference(problem.out_key.scales(), expected.out_key.scales(), "key scale"),
        first_difference(problem.out_value.scales(), expected.out_value.scales(), "value scale")}) {
    if (!difference.empty()) return failed(difference);
  }
  return passed();
}

inline void add_compact_cases(std::vector<Case>& cases) {
  constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16};
  constexpr ElementType kCodes[] = {ElementType::kInt8, ElementType::kFloat8E4M3};
  const auto add = [&](auto change) {
    CompactSpec spec;
    change(spec);
    cases.push_back({spec.name(), [=](uint64_t seed) { return run_compact(spec, seed); }});
  };
  for (int dim : {1, 7, 40, 80, 96, 128, 192, 256}) {
    for (ElementType type : kTypes) {
      const auto same = [=](CompactSpec& s) { s.type = s.out_type = type, s.head_dim = dim; };
      add(same);
      add([=](CompactSpec& s) { same(s), s.with_slot = true; });
      for (ElementType code : kCodes) {
        add([=](CompactSpec& s) { same(s), s.out_type = code, s.with_slot = dim % 16 == 0; });
      }
    }
  }
  for (ElementType code : kCodes) {
    add([=](CompactSpec& s) { s.type = s.out_type = code; });
    for (bool slot : {false, true}) {
      add([=](CompactSpec& s) {
        s.type = ElementType::kFloat32, s.out_type = code, s.ties = true, s.with_slot = slot;
      });
    }
  }
  add([](CompactSpec& s) { s.past_rows = 0; });
  add([](CompactSpec& s) { s.gathered_rows = 0; });
  add([](CompactSpec& s) { s.gathered_rows = 0, s.past_rows = 0; });
  add([](CompactSpec& s) { s.gathered_rows = 400, s.local_rows = 3, s.batch = 1; });
  add([](CompactSpec& s) { s.batch = 90, s.gathered_rows = 2, s.past_rows = 1, s.kv_heads = 1; });
  add([](CompactSpec& s) { s.rows.rows_first = s.out.rows_first = true; });
  add([](CompactSpec& s) { s.gather_by_row = true; });
  // rows 2^28 elements apart: offsets beyond 32 bits
  add([](CompactSpec& s) { s.kv_heads = s.batch = 1, s.local_rows = 12, s.gathered_rows = 11, s.rows.gap = 1 << 28; });
  add([](CompactSpec& s) { s.kv_heads = s.batch = 1, s.gathered_rows = 7, s.with_slot = true, s.out.gap = 1 << 28; });
  add([](CompactSpec& s) { s.rows.gap = 8, s.out.gap = 16; });
  add([](CompactSpec& s) { s.rows.gap = 1, s.out.gap = 3; });
  add([](CompactSpec& s) { s.rows.offset = 3, s.out.offset = 1; });
  add([](CompactSpec& s) { s.rows.offset = 1, s.out_type = ElementType::kInt8, s.out.gap = 1; });
}

}  // namespace gistkern::suite
