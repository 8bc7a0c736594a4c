// Shared memory read before, or overwritten while, other threads use it.
#include "case.h"

namespace gistkern::broken {
namespace {

constexpr int kBlock = 64;

// out = in reversed
template <bool kMistaken>
__global__ void reverse(const float* in, float* out) {
  float* tile = shared_memory<float>();  // [kBlock]
  tile[threadIdx.x] = in[threadIdx.x];
  if (!kMistaken) __syncthreads();
  out[threadIdx.x] = tile[kBlock - 1 - threadIdx.x];
}

Case missing_barrier("missing_barrier", [](bool mistaken) {
  std::vector<float> in = counting(kBlock), out(kBlock);
  launch_one(mistaken ? reverse<true> : reverse<false>, dim3(1), dim3(kBlock), kBlock * 4, nullptr, in.data(),
             out.data());
  return std::vector<float>(out.rbegin(), out.rend()) == in;
});

// out[i] = sum over the rounds of the right neighbor's value
template <bool kMistaken>
__global__ void sum_neighbors(const float* in, float* out, int rounds) {
  float* tile = shared_memory<float>();  // [kBlock]
  float sum = 0.0f;
  for (int round = 0; round < rounds; ++round) {
    tile[threadIdx.x] = in[round * kBlock + threadIdx.x];
    __syncthreads();
    sum += tile[(threadIdx.x + 1) % kBlock];
    if (!kMistaken) __syncthreads();  // the next round overwrites what a neighbor may not have read
  }
  out[threadIdx.x] = sum;
}

Case missing_second_barrier("missing_second_barrier", [](bool mistaken) {
  constexpr int kRounds = 3;
  std::vector<float> in = counting(kRounds * kBlock), out(kBlock), expected(kBlock);
  launch_one(mistaken ? sum_neighbors<true> : sum_neighbors<false>, dim3(1), dim3(kBlock), kBlock * 4, nullptr,
             in.data(), out.data(), kRounds);
  for (int i = 0; i < kRounds * kBlock; ++i) expected[i % kBlock] += in[i / kBlock * kBlock + (i + 1) % kBlock];
  return out == expected;
});

// out = in with neighboring lanes exchanged, one warp
template <bool kMistaken>
__global__ void exchange(const float* in, float* out) {
  float* tile = shared_memory<float>();  // [32]
  tile[threadIdx.x] = in[threadIdx.x];
  if (!kMistaken) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}

Case missing_syncwarp("missing_syncwarp", [](bool mistaken) {
  std::vector<float> in = counting(32), out(32);
  launch_one(mistaken ? exchange<true> : exchange<false>, dim3(1), dim3(32), 32 * 4, nullptr, in.data(), out.data());
  for (int i = 0; i < 32; ++i) {
    if (out[i] != in[i ^ 1]) return false;
  }
  return true;
});

}  // namespace
}  // namespace gistkern::broken
