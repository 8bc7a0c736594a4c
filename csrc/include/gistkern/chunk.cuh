// A lane's piece of a row, as raw bits: one or more 128-bit loads where the row is aligned, single elements otherwise.
#pragma once

#include "gistkern/convert.cuh"

namespace gistkern {

// kElements elements of kElementBytes each from `row` + first on; `words` come as zeros and stay
// so from head_dim on. `aligned`: the row starts at a
// multiple of 16 bytes, and head_dim is a multiple of kElements.
template <int kElementBytes, int kElements, int kWords>
__device__ __forceinline__ void load_chunk(uint32_t (&words)[kWords], const char* row, int first, int head_dim,
                                           bool aligned) {
  constexpr int kUsedWords = kElements * kElementBytes / 4;
  static_assert(kUsedWords % 4 == 0 && kUsedWords <= kWords, "whole 128-bit loads");
  if (first >= head_dim) return;
  const char* source = row + static_cast<int64_t>(first) * kElementBytes;
  if (aligned) {
#pragma unroll
    for (int word = 0; word < kUsedWords; word += 4) {
      uint4 loaded = load_128(source + word * 4);
      words[word] = loaded.x;
      words[word + 1] = loaded.y;
      words[word + 2] = loaded.z;
      words[word + 3] = loaded.w;
    }
    return;
  }
  constexpr int kPerWord = 4 / kElementBytes;
#pragma unroll
  for (int element = 0; element < kElements; ++element) {
    if (first + element >= head_dim) break;
    uint32_t bits;
    if (kElementBytes == 4) {
      bits = reinterpret_cast<const uint32_t*>(source)[element];
    } else if (kElementBytes == 2) {
      bits = reinterpret_cast<const uint16_t*>(source)[element];
    } else {
      bits = reinterpret_cast<const uint8_t*>(source)[element];
    }
    words[element / kPerWord] |= bits << (element % kPerWord * kElementBytes * 8);
  }
}

// Elements of type T in `words` as floats.
template <typename T, int kElements, int kWords>
__device__ __forceinline__ void chunk_to_floats(float (&values)[kElements], const uint32_t (&words)[kWords], T) {
#pragma unroll
  for (int pair = 0; pair < kElements / 2; ++pair) {
    float2 two = pair_to_floats(words[pair], T());
    values[2 * pair] = two.x;
    values[2 * pair + 1] = two.y;
  }
}
template <int kElements, int kWords>
__device__ __forceinline__ void chunk_to_floats(float (&values)[kElements], const uint32_t (&words)[kWords], float) {
#pragma unroll
  for (int element = 0; element < kElements; ++element) values[element] = bits_as<float>(words[element]);
}

// Quantized codes in `words` as floats, without their scale. Both kinds of codes are exact in half.
template <int kElements, int kWords>
__device__ __forceinline__ void codes_to_floats(float (&values)[kElements], const uint32_t (&words)[kWords],
                                                ElementType type) {
#pragma unroll
  for (int pair = 0; pair < kElements / 2; ++pair) {
    float2 two = pair_to_floats(widen_pair<half>(words[pair / 2], pair % 2 == 1, type), half());
    values[2 * pair] = two.x;
    values[2 * pair + 1] = two.y;
  }
}

}  // namespace gistkern
