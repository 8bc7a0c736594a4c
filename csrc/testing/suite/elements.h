// Element types on the host: NVIDIA's own conversions, and every value as a double.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "gistkern/types.h"

namespace gistkern::suite {

inline const char* name_of(ElementType type) {
  static constexpr const char* kNames[] = {"float32", "float16", "bfloat16", "int8", "e4m3"};
  return kNames[static_cast<int>(type)];
}

inline bool is_code(ElementType type) { return type == ElementType::kInt8 || type == ElementType::kFloat8E4M3; }

// What the largest magnitude of a row is mapped to.
inline double largest_code(ElementType type) { return type == ElementType::kInt8 ? 127.0 : 448.0; }

// Relative error of rounding to a type of queries.
inline double unit_roundoff(ElementType type) {
  return type == ElementType::kFloat32 ? 0x1p-24 : type == ElementType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

template <typename Stored>
Stored read_as(const void* bits) {
  Stored value;
  std::memcpy(&value, bits, sizeof(value));
  return value;
}

template <typename Stored>
void write_as(void* bits, Stored value) {
  std::memcpy(bits, &value, sizeof(value));
}

// A code's value is the code's own, without its row's scale.
inline double decode(ElementType type, const void* bits) {
  switch (type) {
    case ElementType::kFloat32:
      return read_as<float>(bits);
    case ElementType::kFloat16:
      return __half2float(read_as<half>(bits));
    case ElementType::kBFloat16:
      return __bfloat162float(read_as<__nv_bfloat16>(bits));
    case ElementType::kInt8:
      return read_as<int8_t>(bits);
    case ElementType::kFloat8E4M3:
      return __half2float(half(__nv_cvt_fp8_to_halfraw(read_as<uint8_t>(bits), __NV_E4M3)));
  }
  return NAN;
}

// To nearest, ties to even, saturating codes.
inline void encode(ElementType type, float value, void* bits) {
  switch (type) {
    case ElementType::kFloat32:
      return write_as(bits, value);
    case ElementType::kFloat16:
      return write_as(bits, __float2half_rn(value));
    case ElementType::kBFloat16:
      return write_as(bits, __float2bfloat16_rn(value));
    case ElementType::kInt8:
      return write_as(bits, static_cast<int8_t>(std::nearbyint(std::fmin(std::fmax(value, -127.0f), 127.0f))));
    case ElementType::kFloat8E4M3:
      return write_as(bits, __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3));
  }
}

inline float rounded(ElementType type, float value) {
  unsigned char bits[4];
  encode(type, value, bits);
  return static_cast<float>(decode(type, bits));
}

}  // namespace gistkern::suite
