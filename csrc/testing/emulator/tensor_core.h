// mma.m16n8k16: d [16, 8] += a [16, 16] b [16, 8], products exact, sums in fp32.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator/thread.h"

namespace gistkern::emulator {

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  uint32_t wide = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  float magnitude;
  if (wide >= 0x7c00u << 13) {
    wide |= 0x7f800000u;  // infinity or NaN
    std::memcpy(&magnitude, &wide, 4);
  } else {
    // the exponents' biases differ by 112; the product rounds nothing and makes subnormals right
    std::memcpy(&magnitude, &wide, 4);
    magnitude *= 0x1p112f;
  }
  uint32_t result;
  std::memcpy(&result, &magnitude, 4);
  result |= sign;
  std::memcpy(&magnitude, &result, 4);
  return magnitude;
}

// Lane 4 g + t holds (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"):
//   a register r: row g + 8 (r % 2), columns 2 t + 8 (r / 2) and the next
//   b register r: rows 2 t + 8 r and the next, column g
//   d value i:    row g + 8 (i / 2), column 2 t + i % 2
inline void complete_mma(Thread* const* lanes, bool bfloat16) {
  float a[16][16], b[16][8], d[16][8];
  const auto decode = [=](uint32_t bits) { return bfloat16 ? from_bfloat16(bits) : from_float16(bits); };
  for (uint32_t lane = 0; lane < kWarp; ++lane) {
    const uint32_t group = lane / 4, pair = lane % 4 * 2;
    const uint32_t* const brought = lanes[lane]->brought;
    for (uint32_t r = 0; r < 4; ++r) {
      a[group + r % 2 * 8][pair + r / 2 * 8] = decode(brought[r] & 0xffffu);
      a[group + r % 2 * 8][pair + r / 2 * 8 + 1] = decode(brought[r] >> 16);
    }
    for (uint32_t r = 0; r < 2; ++r) {
      b[pair + r * 8][group] = decode(brought[4 + r] & 0xffffu);
      b[pair + r * 8 + 1][group] = decode(brought[4 + r] >> 16);
    }
    for (uint32_t i = 0; i < 4; ++i) std::memcpy(&d[group + i / 2 * 8][pair + i % 2], &brought[6 + i], 4);
  }
  for (uint32_t row = 0; row < 16; ++row) {
    for (uint32_t k = 0; k < 16; ++k) {
      for (uint32_t column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (uint32_t lane = 0; lane < kWarp; ++lane) {
    const uint32_t group = lane / 4, pair = lane % 4 * 2;
    for (uint32_t i = 0; i < 4; ++i) std::memcpy(&lanes[lane]->result[i], &d[group + i / 2 * 8][pair + i % 2], 4);
  }
}

}  // namespace gistkern::emulator
