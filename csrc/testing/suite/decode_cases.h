// Decode cases: which are run, and how one is judged.
#pragma once

#include <memory>
#include <vector>

#include "emulator.h"
#include "gistkern/arrivals.h"
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

// Memory of the splits, of exactly the size asked for.
struct Workspace {
  std::unique_ptr<Array<float>> memory;
  DecodeScratch scratch{[](void* self, int64_t floats) {
                          auto& memory = static_cast<Workspace*>(self)->memory;
                          memory = std::make_unique<Array<float>>(floats);
                          return memory->get();
                        },
                        this};
};

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
  Workspace workspace;
  const int64_t conflicts = emulator_bank_conflicts();
  if (const char* error = gistkern_decode(&arguments, variant, &workspace.scratch, nullptr)) return failed(error);
  if (emulator_bank_conflicts() != conflicts) return failed("bank conflicts of ldmatrix");
  Outcome outcome = judge(problem, arguments.scale, out, lse.get());
  if (workspace.memory) outcome.detail += ", split";
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
    Workspace workspace;
    const char* const error = gistkern_decode(&arguments, variant, &workspace.scratch, nullptr);
    return why != nullptr && error != nullptr && std::string(why) == error && lse == 7.0f && !workspace.memory;
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

// Split launches: one kernel each, the same bits whichever block comes last, and what splitting costs.
inline Outcome run_split(const DecodeSpec& spec, DecodeVariant variant, uint64_t seed) {
  Generator generator(seed);
  DecodeProblem problem(spec, generator);
  DecodeArguments arguments = problem.arguments();
  if (const char* why = gistkern_decode_refuses(&arguments, variant)) return skipped(why);
  const int64_t rows = int64_t{spec.batch} * spec.query_heads * spec.query_rows;
  const int64_t out_bytes = rows * spec.head_dim * element_bytes(spec.type);
  std::string first;
  int64_t bytes_per_split = 0, bytes_unsplit = 0;
  const char* const order = std::getenv("GISTKERN_EMULATOR_SEED");
  const std::string restored = order == nullptr ? "1" : order;
  Outcome outcome = passed();
  for (int run = 0; run < 4 && outcome.kind == Outcome::Kind::kPassed; ++run) {
    // the last run has two splits, and need not have the same bits
    arguments.multiprocessors = spec.multiprocessors;
    if (run == 3) arguments.multiprocessors = plan_decode(arguments, variant).units;
    const DecodePlan plan = plan_decode(arguments, variant);
    if (plan.splits < 2) return failed("this case is not split");
    Bytes out(out_bytes);
    Array<float> lse(rows);
    arguments.out = out.data(), arguments.lse = lse.get();
    Workspace workspace;
    setenv("GISTKERN_EMULATOR_SEED", std::to_string(100 + run).c_str(), 1);
    const EmulatorCounts before = emulator_counts();
    const char* const error = gistkern_decode(&arguments, variant, &workspace.scratch, nullptr);
    const EmulatorCounts after = emulator_counts();
    setenv("GISTKERN_EMULATOR_SEED", restored.c_str(), 1);
    if (error != nullptr) return failed(error);
    const int64_t blocks = int64_t{plan.units} * plan.splits, bytes = after.bytes - before.bytes;
    if (after.launches - before.launches != 1) return failed("not one launch");
    if (after.arrivals - before.arrivals != blocks) return failed("not one arrival a block");
    if (after.barriers - before.barriers != 3 * blocks) return failed("not three barriers a block");
    outcome = judge(problem, arguments.scale, out.data(), lse.get());
    std::string bits(out.data(), out.data() + out_bytes);
    bits.append(reinterpret_cast<const char*>(lse.get()), rows * sizeof(float));
    if (run == 0) first = bits;
    if (run < 3 && bits != first) return failed("the bits depend on the order of blocks");
    if (plan.variant != DecodeVariant::kTensorCore) continue;
    // every warp reads its unit's query; keys and values are read once, however many splits there are
    bytes_per_split = rows * spec.head_dim * element_bytes(spec.type) * plan.warps;
    if (run == 0) bytes_unsplit = bytes - plan.splits * bytes_per_split;
    if (bytes != bytes_unsplit + plan.splits * bytes_per_split) return failed("splits read rows more than once");
  }
  return outcome;
}

// Counters of streams, and of launches that are recorded into a graph.
inline Outcome run_arrivals(uint64_t) {
  Arrivals arrivals;
  const auto take = [&](uintptr_t stream, int units) {
    uint32_t* counters = nullptr;
    const char* const error = arrivals.of_launch(reinterpret_cast<void*>(stream), units, &counters);
    for (int i = 0; error == nullptr && i < units; ++i) {
      if (counters[i] != 0) return static_cast<uint32_t*>(nullptr);
    }
    return error == nullptr ? counters : nullptr;
  };
  uint32_t* const one = take(1, kMaxSplitUnits);
  uint32_t* const two = take(2, 8);
  if (one == nullptr || two == nullptr || take(1, 3) != one || take(2, 8) != two) return failed("a stream has its own");
  emulator_capture(true);
  std::vector<uint32_t*> taken = {one, two};
  for (int i = 0; i < 300; ++i) taken.push_back(take(1 + i % 2, kMaxSplitUnits));
  emulator_capture(false);
  std::sort(taken.begin(), taken.end());
  if (taken[0] == nullptr) return failed("no counters, or not zero");
  for (size_t i = 1; i < taken.size(); ++i) {
    if (taken[i] - taken[i - 1] < kMaxSplitUnits) return failed("two launches share counters");
  }
  return take(1, 8) == one ? passed() : failed("a stream keeps its own");
}

inline void add_split_cases(std::vector<Case>& cases) {
  cases.push_back({"arrivals", run_arrivals});
  DecodeSpec spec;
  spec.gist_capacity = 900, spec.tail_capacity = 30, spec.multiprocessors = 132, spec.batch = 1, spec.query_rows = 2;
  std::vector<DecodeSpec> specs(4, spec);
  specs[0].query_heads = 4, specs[0].kv_heads = 1;  // four blocks, all of fibers of their own under TSan
  specs[1].head_dim = 128, specs[1].query_heads = 16, specs[1].query_rows = 1;
  specs[2].head_dim = 200, specs[2].type = specs[2].rows_type = ElementType::kFloat16, specs[2].some_see_nothing = true;
  specs[3].gist_capacity = 9000, specs[3].kv_heads = 1, specs[3].head_dim = 8;  // more splits than lanes
  for (const DecodeSpec& item : specs) {
    for (DecodeVariant variant : {DecodeVariant::kSimt, DecodeVariant::kTensorCore}) {
      const std::string name = variant == DecodeVariant::kSimt ? "split-simt-" : "split-mma-";
      cases.push_back({name + item.name(), [=](uint64_t seed) { return run_split(item, variant, seed); }});
    }
  }
}

inline void add_decode_cases(std::vector<Case>& cases) {
  cases.push_back({"decode-refusals", run_refusals});
  add_split_cases(cases);
  for (const DecodeSpec& spec : decode_specs()) {
    for (DecodeVariant variant : {DecodeVariant::kSimt, DecodeVariant::kTensorCore}) {
      const std::string name = variant == DecodeVariant::kSimt ? "decode-simt-" : "decode-mma-";
      cases.push_back({name + spec.name(), [=](uint64_t seed) { return run_decode(spec, variant, seed); }});
    }
  }
}

}  // namespace gistkern::suite
