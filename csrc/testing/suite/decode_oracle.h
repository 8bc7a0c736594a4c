// Attention of one query row in double, and the plain computation in its type, whose error is the budget.
#pragma once

#include <cmath>
#include <vector>

#include "suite/decode_problem.h"

namespace gistkern::suite {

struct Attended {
  std::vector<double> out;
  double lse = -INFINITY;
};

// The rows that one query row of one head sees, as doubles.
struct Visible {
  std::vector<double> query;
  std::vector<std::vector<double>> keys, values;
};

inline Visible visible_rows(DecodeProblem& problem, int b, int head, int i) {
  const DecodeSpec& spec = problem.spec;
  const int kv_head = head / (spec.query_heads / spec.kv_heads);
  Visible result;
  const auto row_of = [&](const RowBuffer& buffer, int sample, int h, int row) {
    std::vector<double> values(spec.head_dim);
    for (int d = 0; d < spec.head_dim; ++d) values[d] = buffer.value(sample, h, row, d);
    return values;
  };
  result.query = row_of(problem.query, b, head, i);
  const size_t at = problem.interval(b, i);
  if (spec.gist_capacity > 0) {
    for (int row = problem.gist_begin[at]; row < problem.gist_end[at]; ++row) {
      result.keys.push_back(row_of(problem.gist_key, problem.gist_sample(b), kv_head, row));
      result.values.push_back(row_of(problem.gist_value, problem.gist_sample(b), kv_head, row));
    }
  }
  if (spec.tail_capacity > 0) {
    for (int row = problem.local_begin[at]; row < problem.tail_end(b, i); ++row) {
      const auto [sample, place] = problem.tail_place(b, row);
      result.keys.push_back(row_of(problem.tail_key, sample, kv_head, place));
      result.values.push_back(row_of(problem.tail_value, sample, kv_head, place));
    }
  }
  return result;
}

// Number: double for the oracle, float for the plain computation. `round` is applied to probabilities and outputs.
template <typename Number, typename Round>
Attended attend(const Visible& visible, Number scale, Round round) {
  const size_t columns = visible.keys.size(), dim = visible.query.size();
  Attended result{std::vector<double>(dim, 0.0)};
  if (columns == 0) return result;
  std::vector<Number> scores(columns);
  Number largest = -INFINITY, sum = 0;
  for (size_t j = 0; j < columns; ++j) {
    Number dot = 0;
    for (size_t d = 0; d < dim; ++d)
      dot += static_cast<Number>(visible.query[d]) * static_cast<Number>(visible.keys[j][d]);
    scores[j] = dot * scale;
    largest = std::max(largest, scores[j]);
  }
  std::vector<Number> out(dim, 0);
  for (size_t j = 0; j < columns; ++j) {
    const Number probability = std::exp(scores[j] - largest);
    sum += probability;
    for (size_t d = 0; d < dim; ++d) out[d] += round(probability) * static_cast<Number>(visible.values[j][d]);
  }
  for (size_t d = 0; d < dim; ++d) result.out[d] = round(out[d] / sum);
  result.lse = largest + std::log(sum);
  return result;
}

inline Attended oracle(const Visible& visible, float scale) {
  return attend<double>(visible, scale, [](double x) { return x; });
}

inline Attended plain(const Visible& visible, float scale, ElementType type) {
  return attend<float>(visible, scale, [=](float x) { return rounded(type, x); });
}

}  // namespace gistkern::suite
