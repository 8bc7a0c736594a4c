// Vectors of GISTKERN_LANES floats on GCC's vector extensions: one source for AVX2, AVX-512 and anything else.
//
// Everything in a file that includes this one lives in a namespace per instruction set (GISTKERN_ISA), because the
// same source is compiled several times. No standard containers here: their inline code would be shared between
// translation units that were compiled for different instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define GISTKERN_NAMESPACE_BEGIN namespace gistkern::cpu::GISTKERN_ISA {
#define GISTKERN_NAMESPACE_END }
#define GISTKERN_INLINE inline __attribute__((always_inline))

GISTKERN_NAMESPACE_BEGIN

constexpr int kLanes = GISTKERN_LANES;
// A strip is the unit of rows: two vectors, the width of the micro-kernel (gemm.h).
constexpr int kStripVectors = 2;
constexpr int kStrip = kStripVectors * kLanes;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef float UnalignedFloats __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t UnalignedInts __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

GISTKERN_INLINE Floats load(const float* from) { return *reinterpret_cast<const UnalignedFloats*>(from); }
GISTKERN_INLINE Ints load(const int32_t* from) { return *reinterpret_cast<const UnalignedInts*>(from); }
GISTKERN_INLINE void store(float* to, Floats value) { *reinterpret_cast<UnalignedFloats*>(to) = value; }
GISTKERN_INLINE Floats broadcast(float value) { return Floats{} + value; }
GISTKERN_INLINE Ints broadcast(int32_t value) { return Ints{} + value; }

template <typename To, typename From>
GISTKERN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Lanes of `yes` where the mask (from a comparison) is set, else of `no`.
GISTKERN_INLINE Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }

// A NaN in `candidate` gives `current`: it then shows in the sum instead of the maximum.
GISTKERN_INLINE Floats maximum(Floats candidate, Floats current) {
#if defined(__AVX512F__) && GISTKERN_LANES == 16
  return _mm512_max_ps(candidate, current);
#elif defined(__AVX2__) && GISTKERN_LANES == 8
  return _mm256_max_ps(candidate, current);
#else
  return candidate > current ? candidate : current;
#endif
}

// The value rounded to fp32, where the compiler would otherwise fuse the product that made it into a following sum.
GISTKERN_INLINE Floats rounded(Floats value) {
#if defined(__x86_64__) && GISTKERN_LANES == 16 && defined(__AVX512F__)
  asm("" : "+v"(value));
  return value;
#elif defined(__x86_64__) && GISTKERN_LANES <= 8
  asm("" : "+x"(value));
  return value;
#else
  float copy[kLanes];
  store(copy, value);
  asm volatile("" : : "r"(copy) : "memory");
  return load(copy);
#endif
}

GISTKERN_INLINE float sum(Floats value) {
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += value[lane];
  return total;
}

inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

GISTKERN_NAMESPACE_END
