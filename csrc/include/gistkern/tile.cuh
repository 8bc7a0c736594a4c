// Tiles of column rows in shared memory for ldmatrix: the swizzle, asynchronous copies, and quantized codes made
// 16-bit.
//
// A tile belongs to one warp, so only __syncwarp() orders its use.
#pragma once

#include "gistkern/convert.cuh"
#include "gistkern/port.cuh"

namespace gistkern {

// [kRows, kWidth] 16-bit elements in 16-byte chunks. Chunk c of row r lies at c ^ (r % 8), so the eight rows that
// ldmatrix reads at one chunk are in different banks, and so are the chunks of a row that a copy writes.
template <int kRows, int kWidth>
struct Tile {
  static constexpr int kChunks = kWidth / 8;
  static constexpr int kBytes = kRows * kWidth * 2;

  __device__ __forceinline__ static int offset(int row, int chunk) {
    return (row * kChunks + (chunk ^ (row & 7))) * 16;
  }

  // Codes of one byte arrive in the space of their own row: kChunks / 2 chunks in order, in its lower half, or at width
  // 64 in the upper half of every second row, which keeps the banks of two rows apart.
  __device__ __forceinline__ static int code_offset(int row, int chunk) {
    return (row * kChunks + (chunk + row * kChunks / 2 % 8) % kChunks) * 16;
  }
};

__device__ __forceinline__ const char* shuffle_pointer(const char* pointer, int lane) {
  uint64_t bits = bits_as<uint64_t>(pointer);
  uint64_t low = __shfl_sync(0xffffffffu, static_cast<uint32_t>(bits), lane);
  uint64_t high = __shfl_sync(0xffffffffu, static_cast<uint32_t>(bits >> 32), lane);
  return bits_as<const char*>(high << 32 | low);
}

// Which rows of a tile are codes: gist rows stand before row `boundary`, tail rows from it on.
struct TileTypes {
  int boundary;
  ElementType gist, tail;

  __device__ __forceinline__ ElementType of(int row) const { return row < boundary ? gist : tail; }
};

// Starts copying rows into a tile; zeros where a row or a chunk does not exist. Lane l (l < kRows) holds the address of
// row l (any valid address where l >= rows). Rows of codes go to code_offset.
template <int kRows, int kWidth, bool kQuantized>
__device__ __forceinline__ void copy_tile(char* tile, const char* row_address, int rows, int head_dim,
                                          const TileTypes& types) {
  using Layout = Tile<kRows, kWidth>;
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < kRows * Layout::kChunks / 32; ++step) {
    int row = (step * 32 + lane) / Layout::kChunks, chunk = (step * 32 + lane) % Layout::kChunks;
    const char* source = shuffle_pointer(row_address, row);
    bool codes = kQuantized && holds_codes(types.of(row));
    // of a row of codes only the first half of the chunks exists; the others clear the space they do not need
    int chunks = codes ? head_dim / 16 : head_dim / 8;
    int offset = codes ? Layout::code_offset(row, chunk) : Layout::offset(row, chunk);
    copy_async_16(tile + offset, source + chunk * 16, row < rows && chunk < chunks ? 16 : 0);
  }
}

// Turns the codes in rows [first, end) into elements of type T at their swizzled places.
template <typename T, int kRows, int kWidth, ElementType kType>
__device__ __forceinline__ void widen_rows(char* tile, int first, int end) {
  using Layout = Tile<kRows, kWidth>;
  constexpr int kRowsPerStep = 32 / Layout::kChunks;  // a lane makes one chunk of eight codes
  constexpr int kSteps = 4;                           // that are in registers together
  int lane = threadIdx.x % 32, chunk = lane % Layout::kChunks;
#pragma unroll
  for (int begin = 0; begin < kRows; begin += kSteps * kRowsPerStep) {
    uint2 codes[kSteps];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      int row = begin + step * kRowsPerStep + lane / Layout::kChunks;
      codes[step] = {0, 0};
      if (row >= first && row < end) {
        codes[step] = *reinterpret_cast<const uint2*>(tile + Layout::code_offset(row, chunk / 2) + chunk % 2 * 8);
      }
    }
    __syncwarp();  // all codes of these rows are in registers before their places are written
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      int row = begin + step * kRowsPerStep + lane / Layout::kChunks;
      uint4 elements = {widen_pair<T>(codes[step].x, false, kType), widen_pair<T>(codes[step].x, true, kType),
                        widen_pair<T>(codes[step].y, false, kType), widen_pair<T>(codes[step].y, true, kType)};
      if (row >= first && row < end) *reinterpret_cast<uint4*>(tile + Layout::offset(row, chunk)) = elements;
    }
  }
}

// The same for all rows of a tile that are codes.
template <typename T, int kRows, int kWidth>
__device__ __forceinline__ void widen_tile(char* tile, const TileTypes& types) {
#pragma unroll 1
  for (int part = 0; part < 2; ++part) {
    ElementType type = part == 0 ? types.gist : types.tail;
    int first = part == 0 ? 0 : types.boundary, end = part == 0 ? types.boundary : kRows;
    if (first >= kRows || end <= 0) continue;
    if (type == ElementType::kInt8) widen_rows<T, kRows, kWidth, ElementType::kInt8>(tile, first, end);
    if (type == ElementType::kFloat8E4M3) widen_rows<T, kRows, kWidth, ElementType::kFloat8E4M3>(tile, first, end);
  }
  __syncwarp();
}

}  // namespace gistkern
