// Element types on the device: pairs of 16-bit elements, quantized codes made 16-bit exactly, and quantizing.
#pragma once

#include <cuda_fp8.h>

#include <cmath>
#include <cstring>

#include "gistkern/port.cuh"
#include "gistkern/types.h"

namespace gistkern {

template <typename To, typename From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

// The two elements of a word, the low half first.
__device__ __forceinline__ float2 pair_to_floats(uint32_t word, half) { return __half22float2(bits_as<__half2>(word)); }
__device__ __forceinline__ float2 pair_to_floats(uint32_t word, __nv_bfloat16) {
  // the upper half of an fp32
  return make_float2(bits_as<float>(word << 16), bits_as<float>(word & 0xffff0000u));
}

// Two floats rounded to 16 bits, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_floats(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_floats<half>(float low, float high) {
  return bits_as<uint32_t>(__floats2half2_rn(low, high));
}
template <>
__device__ __forceinline__ uint32_t pack_floats<__nv_bfloat16>(float low, float high) {
  return bits_as<uint32_t>(__floats2bfloat162_rn(low, high));
}

__device__ __forceinline__ void store_element(float* out, float value) { *out = value; }
__device__ __forceinline__ void store_element(half* out, float value) { *out = __float2half_rn(value); }
__device__ __forceinline__ void store_element(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }

__device__ __forceinline__ bool holds_codes(ElementType type) {
  return type == ElementType::kInt8 || type == ElementType::kFloat8E4M3;
}

// Two of four codes, the upper or the lower ones, in the low or in the high bytes of two 16-bit fields.
__device__ __forceinline__ uint32_t spread_low(uint32_t codes, bool upper) {
  return permute_bytes(codes, 0, upper ? 0x4342 : 0x4140);
}
__device__ __forceinline__ uint32_t spread_high(uint32_t codes, bool upper) {
  return permute_bytes(codes, 0, upper ? 0x3424 : 0x1404);
}

// Two int8 codes as 16-bit elements without a conversion instruction: the code becomes the low mantissa bits of a
// number whose last place is 1, from which the offset is subtracted. Exact.
__device__ __forceinline__ __half2 widen_int8(uint32_t codes, bool upper, half) {
  uint32_t shifted = spread_low(codes, upper) ^ 0x64806480u;  // 1024 + (code + 128)
  return __hsub2(bits_as<__half2>(shifted), bits_as<__half2>(0x64806480u));
}
__device__ __forceinline__ __nv_bfloat162 widen_int8(uint32_t codes, bool upper, __nv_bfloat16) {
  // bfloat16 has 7 mantissa bits: the low 7 bits of the code on top of 128, minus 128 or, by the sign bit, 256
  constexpr uint32_t k128 = 0x43004300u;
  uint32_t spread = spread_low(codes, upper);
  return __hsub2(bits_as<__nv_bfloat162>((spread & 0x007f007fu) | k128),
                 bits_as<__nv_bfloat162>((spread & 0x00800080u) | k128));
}

// Two e4m3 codes: sign, exponent and mantissa move to their places, and a power of two corrects the exponent's bias
// (subnormals included). Exact. The two codes for NaN read as +-480: a row that is not finite has its NaN in the scale.
__device__ __forceinline__ __half2 widen_e4m3(uint32_t codes, bool upper, half) {
  uint32_t spread = spread_high(codes, upper);
  uint32_t moved = (spread & 0x80008000u) | (spread >> 1 & 0x3f803f80u);
  return __hmul2(bits_as<__half2>(moved), bits_as<__half2>(0x5c005c00u));  // 2^8
}
__device__ __forceinline__ __nv_bfloat162 widen_e4m3(uint32_t codes, bool upper, __nv_bfloat16) {
  uint32_t spread = spread_high(codes, upper);
  uint32_t moved = (spread & 0x80008000u) | (spread >> 4 & 0x07f007f0u);
  return __hmul2(bits_as<__nv_bfloat162>(moved), bits_as<__nv_bfloat162>(0x7b807b80u));  // 2^120
}

template <typename T>
__device__ __forceinline__ uint32_t widen_pair(uint32_t codes, bool upper, ElementType type) {
  return type == ElementType::kInt8 ? bits_as<uint32_t>(widen_int8(codes, upper, T()))
                                    : bits_as<uint32_t>(widen_e4m3(codes, upper, T()));
}

// Largest magnitude that a code stands for at scale 1.
__device__ __forceinline__ float largest_code(ElementType type) { return type == ElementType::kInt8 ? 127.0f : 448.0f; }

// The code of value / scale, to nearest even, saturating. A scale of 0 is that of a row of zeros.
__device__ __forceinline__ uint8_t quantize(float value, float scale, ElementType type) {
  if (scale == 0.0f) return 0;
  float ratio = value / scale;
  if (type == ElementType::kFloat8E4M3) return __nv_cvt_float_to_fp8(ratio, __NV_SATFINITE, __NV_E4M3);
  // a NaN ends at -127: its row's scale is NaN as well
  return static_cast<uint8_t>(static_cast<int8_t>(fminf(fmaxf(rintf(ratio), -127.0f), 127.0f)));
}

}  // namespace gistkern
