// The one matrix product of the CPU kernels: a register-blocked micro-kernel and the loop over it.
//
//   C[m, lane] (+)= sum_k A(m, k) * B[k, lane]         lane: one strip wide
//
// A is read by scalars that are broadcast, B and C by vectors. So a strip of rows transposed once (queries as
// [head_dim][strip]) meets keys and values in the layout they already have: nothing else is packed.
#pragma once

#include "lanes.h"

GISTKERN_NAMESPACE_BEGIN

// A(m, k) = a[m * lda + k], or a[k * lda + m].
enum class Layout { kRows, kColumns };
// What happens to the old C: replaced, added to, or multiplied by `alpha` lane by lane and added to.
enum class Update { kReplace, kAdd, kScale };

// As many accumulators as the registers hold, besides the strip of B and one broadcast.
#if defined(__AVX512F__) && GISTKERN_LANES == 16
constexpr int kBlockRows = 12;
#else
constexpr int kBlockRows = 6;
#endif

template <int kRows, Layout kLayout, Update kUpdate>
GISTKERN_INLINE void micro_kernel(const float* __restrict a, int64_t lda, const float* __restrict b, int64_t ldb,
                                  int64_t depth, float* __restrict c, int64_t ldc, const Floats* alpha) {
  Floats sums[kRows][kStripVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats strip[kStripVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kStripVectors; ++v) strip[v] = load(b + k * ldb + v * kLanes);
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      const float factor = kLayout == Layout::kRows ? a[m * lda + k] : a[k * lda + m];
#pragma GCC unroll 2
      for (int v = 0; v < kStripVectors; ++v) sums[m][v] += factor * strip[v];
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < kStripVectors; ++v) {
      float* target = c + m * ldc + v * kLanes;
      Floats value = sums[m][v];
      if constexpr (kUpdate == Update::kAdd) value += load(target);
      if constexpr (kUpdate == Update::kScale) value += load(target) * alpha[v];
      store(target, value);
    }
  }
}

template <int kRows, Layout kLayout, Update kUpdate>
inline void block_of(int rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                     int64_t ldc, const Floats* alpha) {
  if (rows == kRows) {
    micro_kernel<kRows, kLayout, kUpdate>(a, lda, b, ldb, depth, c, ldc, alpha);
  } else if constexpr (kRows > 1) {
    block_of<kRows - 1, kLayout, kUpdate>(rows, a, lda, b, ldb, depth, c, ldc, alpha);
  }
}

template <Layout kLayout, Update kUpdate>
inline void gemm(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                 int64_t ldc, const Floats* alpha = nullptr) {
  const int64_t step = kLayout == Layout::kRows ? lda : 1;
  for (int64_t m = 0; m < rows;) {
    // few rows leave the multipliers waiting for their own results: two medium blocks beat a full and a small one
    const int64_t left = rows - m;
    const int64_t take = left <= kBlockRows ? left : left < 2 * kBlockRows ? (left + 1) / 2 : kBlockRows;
    block_of<kBlockRows, kLayout, kUpdate>(static_cast<int>(take), a + m * step, lda, b, ldb, depth, c + m * ldc, ldc,
                                           alpha);
    m += take;
  }
}

GISTKERN_NAMESPACE_END
