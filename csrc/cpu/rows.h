// Rows of any element type as fp32, and back.
#pragma once

#include "gistkern/types.h"
#include "lanes.h"

GISTKERN_NAMESPACE_BEGIN

// By bits: compilers know _Float16 late and on some processors only.
GISTKERN_INLINE float widen_half(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
  float value = magnitude < 0x400 ? static_cast<float>(magnitude) * 0x1p-24f  // subnormal
                                  : bit_cast<float>((magnitude << 13) + (112u << 23));
  if (magnitude >= 0x7c00) value = bit_cast<float>(0x7f800000u | magnitude << 13);  // infinity and NaN
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

GISTKERN_INLINE float widen_bfloat(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// e4m3 (FN): sign, 4 exponent bits with bias 7, 3 mantissa bits; S.1111.111 is NaN, there are no infinities.
GISTKERN_INLINE float widen_e4m3(uint8_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80) << 24, magnitude = bits & 0x7f;
  float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f  // subnormal
                              : bit_cast<float>((magnitude << 20) + (120u << 23));
  if (magnitude == 0x7f) value = __builtin_nanf("");
  return bit_cast<float>(bit_cast<uint32_t>(value) | sign);
}

// Rounds to nearest even; what is larger than the largest e4m3 becomes it.
GISTKERN_INLINE uint8_t narrow_e4m3(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 24 & 0x80;
  if (value != value) return static_cast<uint8_t>(sign | 0x7f);
  const float magnitude = __builtin_fabsf(value);
  if (magnitude >= 448.0f) return static_cast<uint8_t>(sign | 0x7e);
  if (magnitude < 0x1p-6f)
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(__builtin_rintf(magnitude * 512.0f)));
  const uint32_t rounded = bit_cast<uint32_t>(magnitude) + 0x7ffff + (bits >> 20 & 1);
  return static_cast<uint8_t>(sign | ((rounded - (120u << 23)) >> 20));
}

GISTKERN_INLINE uint16_t narrow_bfloat(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // round to nearest even
}

// Rounds to nearest even.
GISTKERN_INLINE uint16_t narrow_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000;
  if (value != value) return static_cast<uint16_t>(sign | 0x7e00);
  const float magnitude = __builtin_fabsf(value);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  if (magnitude < 0x1p-14f)
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(__builtin_rintf(magnitude * 0x1p24f)));
  const uint32_t whole = bit_cast<uint32_t>(magnitude) + 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((whole - (112u << 23)) >> 13));
}

// `count` elements of `type` at `from`, times `factor`.
inline void widen(const void* from, ElementType type, int64_t count, float factor, float* __restrict to) {
  switch (type) {
    case ElementType::kFloat32:
      std::memcpy(to, from, count * sizeof(float));
      return;
    case ElementType::kFloat16: {
      const auto* source = static_cast<const uint16_t*>(from);
      int64_t i = 0;
#if defined(__F16C__) && GISTKERN_LANES == 8
      for (; i + 8 <= count; i += 8) {
        store(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
      }
#elif defined(__AVX512F__) && GISTKERN_LANES == 16
      for (; i + 16 <= count; i += 16) {
        store(to + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i))));
      }
#endif
      for (; i < count; ++i) to[i] = widen_half(source[i]);
      return;
    }
    case ElementType::kBFloat16: {
      const auto* source = static_cast<const uint16_t*>(from);
      for (int64_t i = 0; i < count; ++i) to[i] = widen_bfloat(source[i]);
      return;
    }
    case ElementType::kInt8: {
      const auto* source = static_cast<const int8_t*>(from);
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(source[i]) * factor;
      return;
    }
    case ElementType::kFloat8E4M3: {
      const auto* source = static_cast<const uint8_t*>(from);
      for (int64_t i = 0; i < count; ++i) to[i] = widen_e4m3(source[i]) * factor;
      return;
    }
  }
}

// `count` floats at `from`, times `factor`, as elements of `type` (a floating type of at least 16 bits).
inline void narrow(const float* __restrict from, float factor, ElementType type, int64_t count, void* to) {
  if (type == ElementType::kFloat32) {
    auto* target = static_cast<float*>(to);
    for (int64_t i = 0; i < count; ++i) target[i] = from[i] * factor;
  } else if (type == ElementType::kBFloat16) {
    auto* target = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < count; ++i) target[i] = narrow_bfloat(from[i] * factor);
  } else {
    auto* target = static_cast<uint16_t*>(to);
    int64_t i = 0;
#if defined(__F16C__) && GISTKERN_LANES == 8
    for (; i + 8 <= count; i += 8) {
      const __m128i halves = _mm256_cvtps_ph(load(from + i) * factor, _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), halves);
    }
#endif
    for (; i < count; ++i) target[i] = narrow_half(from[i] * factor);
  }
}

inline const char* row_address(const Rows& rows, int64_t sample, int64_t head, int64_t row) {
  const int64_t element = sample * rows.stride[0] + head * rows.stride[1] + row * rows.stride[2];
  return static_cast<const char*>(rows.data) + element * element_bytes(rows.type);
}

// One row as fp32.
inline void read_row(const Rows& rows, int64_t sample, int64_t head, int64_t row, int64_t dim, float* to) {
  float factor = 1.0f;
  if (rows.scale) {
    factor = rows.scale[sample * rows.scale_stride[0] + head * rows.scale_stride[1] + row * rows.scale_stride[2]];
  }
  widen(row_address(rows, sample, head, row), rows.type, dim, factor, to);
}

// Rows as fp32, `stride` floats apart.
struct Block {
  const float* data;
  int64_t stride;
};

// fp32 rows of one head from `first` on, in place.
inline Block block_at(const Rows& rows, int64_t sample, int64_t head, int64_t first) {
  return {reinterpret_cast<const float*>(row_address(rows, sample, head, first)), rows.stride[2]};
}

// Rows [first, first + count) of one head: in place where they are fp32, otherwise converted into `scratch`.
inline Block read_block(const Rows& rows, int64_t sample, int64_t head, int64_t first, int64_t count, int64_t dim,
                        float* scratch) {
  if (rows.type == ElementType::kFloat32) return block_at(rows, sample, head, first);
  for (int64_t i = 0; i < count; ++i) read_row(rows, sample, head, first + i, dim, scratch + i * dim);
  return {scratch, dim};
}

GISTKERN_NAMESPACE_END
