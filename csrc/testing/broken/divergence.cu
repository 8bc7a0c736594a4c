// Threads that do not come to a barrier or a collective that waits for them.
#include "case.h"

namespace gistkern::broken {
namespace {

constexpr uint32_t kAll = 0xffffffffu;

__global__ void leave_early(float* out, bool mistaken) {
  if (mistaken && threadIdx.x >= 40) return;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = 1.0f;
}

Case divergent_barrier("divergent_barrier", [](bool mistaken) {
  std::vector<float> out(128);
  launch_one(leave_early, dim3(2), dim3(64), 0, nullptr, out.data(), mistaken);
  return out[127] == 1.0f;
});

// The last lane skips the sum of the mistaken kernel.
__global__ void sum_lanes(float* out, bool mistaken) {
  float value = 1.0f;
  if (mistaken && threadIdx.x == 31) return;
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAll, value, lanes);
  out[threadIdx.x] = value;
}

Case shuffle_lane_missing("shuffle_lane_missing", [](bool mistaken) {
  std::vector<float> out(32);
  launch_one(sum_lanes, dim3(1), dim3(32), 0, nullptr, out.data(), mistaken);
  return out[31] == 32.0f;
});

__global__ void sum_halves(float* out, bool mistaken) {
  float value = 1.0f;
  const uint32_t mine = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  for (int lanes = 8; lanes > 0; lanes /= 2) value += __shfl_xor_sync(mistaken ? 0x0000ffffu : mine, value, lanes);
  out[threadIdx.x] = value;
}

Case shuffle_wrong_mask("shuffle_wrong_mask", [](bool mistaken) {
  std::vector<float> out(32);
  launch_one(sum_halves, dim3(1), dim3(32), 0, nullptr, out.data(), mistaken);
  return out[31] == 16.0f;
});

// Half of the lanes wait at one collective, half at another, each for all.
__global__ void wait_for_each_other(float* out, bool mistaken) {
  const uint32_t mask = mistaken ? kAll : threadIdx.x % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __shfl_sync(mask, static_cast<float>(threadIdx.x), 0);
  } else {
    out[threadIdx.x] = __ballot_sync(mask, threadIdx.x == 1);
  }
}

Case deadlock("deadlock", [](bool mistaken) {
  std::vector<float> out(32);
  launch_one(wait_for_each_other, dim3(1), dim3(32), 0, nullptr, out.data(), mistaken);
  return out[30] == 0.0f && out[31] == 2.0f;
});

}  // namespace
}  // namespace gistkern::broken
