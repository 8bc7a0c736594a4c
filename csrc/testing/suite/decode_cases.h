// Decode cases: which are run, and how one is judged.
#pragma once

#include <vector>

#include "emulator.h"
#include "suite/decode_oracle.h"

namespace gistkern::suite {

// Twice the largest error of the plain computation in the same type. In a small case that may be luckily small, hence
// one rounding of the largest value more, and in fp32, in which sums may run in another order, one unit in the last
// place of a number below 8, the largest that occur.
struct Budget {
  double worst = 0.0;    // error of the plain computation
  double largest = 0.0;  // magnitude of the exact values
  void add(double exact, double plain) {
    worst = std::max(worst, std::fabs(plain - exact));
    largest = std::max(largest, std::fabs(exact));
  }
  double limit(ElementType type) const { return 2.0 * worst + unit_roundoff(type) * largest + 0x1p-21; }
};

inline Outcome judge(DecodeProblem& problem, float scale, const char* out, const float* lse) {
  const DecodeSpec& spec = problem.spec;
  const int bytes = element_bytes(spec.type);
  Budget out_budget, lse_budget;
  double out_error = 0.0, lse_error = 0.0;
  std::string out_place, lse_place;
  for (int b = 0; b < spec.batch; ++b) {
    for (int head = 0; head < spec.query_heads; ++head) {
      for (int i = 0; i < spec.query_rows; ++i) {
        const Visible visible = visible_rows(problem, b, head, i);
        const Attended exact = oracle(visible, scale), rough = plain(visible, scale, spec.type);
        const int64_t row = (int64_t{b} * spec.query_heads + head) * spec.query_rows + i;
        const std::string place = text("sequence %d head %d row %d", b, head, i);
        const bool nothing = visible.keys.empty();
        if (nothing != (lse[row] == -INFINITY)) return failed(place + text(": lse %g", lse[row]));
        for (int d = 0; d < spec.head_dim; ++d) {
          const double got = decode(spec.type, out + (row * spec.head_dim + d) * bytes);
          if (std::isnan(got) || (nothing && got != 0.0)) {
            return failed(place + text(" element %d: out %g, exactly %g", d, got, exact.out[d]));
          }
          out_budget.add(exact.out[d], rough.out[d]);
          if (std::fabs(got - exact.out[d]) > out_error) {
            out_error = std::fabs(got - exact.out[d]);
            out_place = place + text(" element %d: out %g, exactly %g", d, got, exact.out[d]);
          }
        }
        if (nothing) continue;
        lse_budget.add(exact.lse, rough.lse);
        if (!(std::fabs(lse[row] - exact.lse) <= lse_error)) {
          lse_error = std::fabs(lse[row] - exact.lse);
          lse_place = place + text(": lse %g, exactly %g", lse[row], exact.lse);
        }
      }
    }
  }
  const double out_limit = out_budget.limit(spec.type), lse_limit = lse_budget.limit(ElementType::kFloat32);
  const std::string measured =
      text("out error %.2g of %.2g, lse error %.2g of %.2g", out_error, out_limit, lse_error, lse_limit);
  if (!(out_error <= out_limit)) return failed(measured + "; " + out_place);
  if (!(lse_error <= lse_limit)) return failed(measured + "; " + lse_place);
  return {Outcome::Kind::kPassed, measured};
}

inline Outcome run_decode(const DecodeSpec& spec, DecodeVariant variant, uint64_t seed) {
  Generator generator(seed);
  DecodeProblem problem(spec, generator);
  DecodeArguments arguments = problem.arguments();
  const int64_t rows = int64_t{spec.batch} * spec.query_heads * spec.query_rows;
  const int bytes = element_bytes(spec.type), offset = spec.query.offset * bytes;
  Bytes memory(rows * spec.head_dim * bytes + offset);
  char* const out = memory.data() + offset;
  Array<float> lse(rows);
  arguments.out = out, arguments.lse = lse.get();
  if (const char* why = gistkern_decode_refuses(&arguments, variant)) return skipped(why);
  const int64_t floats = gistkern_decode_workspace_floats(&arguments, variant);
  Array<float> workspace(floats);
  arguments.workspace = floats > 0 ? workspace.get() : nullptr;
  const int64_t conflicts = emulator_bank_conflicts();
  if (const char* error = gistkern_decode(&arguments, variant, nullptr)) return failed(error);
  if (emulator_bank_conflicts() != conflicts) return failed("bank conflicts of ldmatrix");
  Outcome outcome = judge(problem, arguments.scale, out, lse.get());
  if (floats > 0) outcome.detail += ", split";
  return outcome;
}

inline std::vector<DecodeSpec> decode_specs() {
  constexpr ElementType kTypes[] = {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16};
  constexpr ElementType kCodes[] = {ElementType::kInt8, ElementType::kFloat8E4M3};
  constexpr int kHeads[][2] = {{1, 1}, {9, 3}, {32, 8}, {40, 1}};
  std::vector<DecodeSpec> specs;
  const auto add = [&](auto change) {
    DecodeSpec spec;
    change(spec);
    if (!is_code(spec.rows_type)) spec.rows_type = spec.type;
    specs.push_back(spec);
  };
  for (ElementType type : kTypes) {
    for (int dim : {1, 7, 40, 80, 96, 128, 192, 256}) {
      add([=](DecodeSpec& s) { s.type = type, s.head_dim = dim, s.query_rows = 2; });
      for (ElementType code : kCodes) {
        add([=](DecodeSpec& s) { s.type = type, s.rows_type = code, s.head_dim = dim, s.pool_rows = 130; });
      }
    }
    for (ElementType code : kCodes) {
      add([=](DecodeSpec& s) { s.type = type, s.rows_type = code, s.mixed_types = true, s.query_rows = 3; });
      add([=](DecodeSpec& s) { s.type = type, s.rows_type = code, s.plain_values = true, s.query_rows = 2; });
    }
    add([=](DecodeSpec& s) { s.type = type, s.batch = 2, s.gist_capacity = 1500, s.multiprocessors = 132; });
    add([=](DecodeSpec& s) {
      s.type = type, s.gist_capacity = 600, s.tail_capacity = 700, s.page_size = 16, s.some_see_nothing = true,
      s.multiprocessors = 33, s.query_rows = 2;
    });
  }
  for (const auto& heads : kHeads) {
    for (int rows = 1; rows <= 8; ++rows) {
      add([&](DecodeSpec& s) {
        s.query_heads = heads[0], s.kv_heads = heads[1], s.query_rows = rows, s.batch = 2;
        s.pool_rows = rows % 2 * 120, s.page_size = rows % 3 * 8;
      });
    }
  }
  for (int rows : {1, 5}) {
    const auto blind = [=](DecodeSpec& s) { s.query_rows = rows, s.some_see_nothing = true, s.batch = 7; };
    add(blind);
    add([=](DecodeSpec& s) { blind(s), s.pool_rows = 200; });
    add([=](DecodeSpec& s) { blind(s), s.page_size = 1; });
    add([=](DecodeSpec& s) { blind(s), s.gist_capacity = 0; });
    add([=](DecodeSpec& s) { blind(s), s.tail_capacity = 0; });
    add([=](DecodeSpec& s) { s.query_rows = rows, s.rows.rows_first = s.query.rows_first = true; });
    add([=](DecodeSpec& s) { s.query_rows = rows, s.rows.gap = 8, s.page_size = 4; });
    add([=](DecodeSpec& s) { s.query_rows = rows, s.rows.gap = 1; });
    add([=](DecodeSpec& s) { s.query_rows = rows, s.rows.offset = 3, s.query.offset = 1; });
    add([=](DecodeSpec& s) { s.query_rows = rows, s.whole_tail = true; });
    add([=](DecodeSpec& s) { s.query_rows = rows, s.intervals = DecodeSpec::Intervals::kByRow; });
    add([=](DecodeSpec& s) { s.query_rows = rows, s.intervals = DecodeSpec::Intervals::kShared; });
    add([=](DecodeSpec& s) { s.query_rows = rows, s.loudness = 100.0f; });
    add([=](DecodeSpec& s) { s.query_rows = rows, s.gist_capacity = 3, s.tail_capacity = rows; });
  }
  const auto split = [](DecodeSpec& s) { s.gist_capacity = 300, s.tail_capacity = 400, s.multiprocessors = 132; };
  add([=](DecodeSpec& s) { split(s), s.head_dim = 7, s.query_rows = 3; });
  add([=](DecodeSpec& s) { split(s), s.head_dim = 40, s.rows_type = ElementType::kInt8, s.pool_rows = 900; });
  add([=](DecodeSpec& s) { split(s), s.head_dim = 80, s.rows_type = ElementType::kFloat8E4M3, s.query_rows = 8; });
  add([=](DecodeSpec& s) { split(s), s.query.offset = 1, s.type = ElementType::kFloat32; });
  // more splits than a warp has lanes
  add([=](DecodeSpec& s) {
    split(s), s.gist_capacity = 9000, s.batch = s.query_heads = s.kv_heads = 1, s.head_dim = 16;
  });
  add([](DecodeSpec& s) { s.batch = 200, s.gist_capacity = 9, s.tail_capacity = 5, s.pool_rows = 300; });
  add([](DecodeSpec& s) { s.batch = 1, s.gist_capacity = 1, s.tail_capacity = 0; });
  add([](DecodeSpec& s) { s.gist_capacity = 0, s.tail_capacity = 0; });
  // rows 2^28 elements apart: offsets beyond 32 bits
  add([](DecodeSpec& s) { s.kv_heads = 1, s.batch = 1, s.gist_capacity = s.tail_capacity = 10, s.rows.gap = 1 << 28; });
  add([](DecodeSpec& s) {
    s.kv_heads = 1, s.gist_capacity = 2, s.pool_rows = s.tail_capacity = 10, s.rows.gap = 1 << 28, s.page_size = 2;
  });
  return specs;
}

// An argument that no kernel serves is named in an error, and nothing is written.
inline Outcome run_refusals(uint64_t seed) {
  const DecodeSpec spec;
  Generator generator(seed);
  DecodeProblem problem(spec, generator);
  const auto refused = [&](DecodeVariant variant, auto change) {
    DecodeArguments arguments = problem.arguments();
    float lse = 7.0f;
    arguments.out = &lse, arguments.lse = &lse;
    change(arguments);
    const char* const why = gistkern_decode_refuses(&arguments, variant);
    const char* const error = gistkern_decode(&arguments, variant, nullptr);
    return why != nullptr && error != nullptr && std::string(why) == error && lse == 7.0f &&
           gistkern_decode_workspace_floats(&arguments, variant) == 0;
  };
  const auto any = DecodeVariant::kAutomatic, mma = DecodeVariant::kTensorCore;
  if (!refused(any, [](DecodeArguments& a) { a.head_dim = 257; })) return failed("head_dim 257");
  if (!refused(any, [](DecodeArguments& a) { a.head_dim = 0; })) return failed("head_dim 0");
  if (!refused(any, [](DecodeArguments& a) { a.query_rows = 9; })) return failed("query_rows 9");
  if (!refused(any, [](DecodeArguments& a) { a.query_heads = 9; })) return failed("query_heads 9, kv_heads 2");
  if (!refused(any, [](DecodeArguments& a) { a.type = ElementType::kInt8; })) return failed("int8 queries");
  if (!refused(any, [](DecodeArguments& a) { a.gist_key.type = ElementType::kFloat32; })) return failed("fp32 keys");
  if (!refused(any, [](DecodeArguments& a) { a.gist_key.type = ElementType::kInt8; })) return failed("no scales");
  if (!refused(any, [](DecodeArguments& a) { a.gist_value.data = nullptr; })) return failed("no gist values");
  if (!refused(any, [](DecodeArguments& a) { a.gist_end = nullptr; })) return failed("no intervals");
  if (!refused(mma, [](DecodeArguments& a) { a.gist_key.stride[2] += 1; })) return failed("unaligned rows");
  if (!refused(mma, [](DecodeArguments& a) { a.head_dim = 63; })) return failed("head_dim 63 on tensor cores");
  return passed();
}

inline void add_decode_cases(std::vector<Case>& cases) {
  cases.push_back({"decode-refusals", run_refusals});
  for (const DecodeSpec& spec : decode_specs()) {
    for (DecodeVariant variant : {DecodeVariant::kSimt, DecodeVariant::kTensorCore}) {
      const std::string name = variant == DecodeVariant::kSimt ? "decode-simt-" : "decode-mma-";
      cases.push_back({name + spec.name(), [=](uint64_t seed) { return run_decode(spec, variant, seed); }});
    }
  }
}

}  // namespace gistkern::suite
