// A sum over shared memory of which one element was never written. With zeros there, as often on a GPU, it is right.
#include "case.h"

namespace gistkern::broken {
namespace {

template <bool kMistaken>
__global__ void sum_tile(float* out) {
  float* tile = shared_memory<float>();  // [33]
  tile[threadIdx.x] = 1.0f;
  if (!kMistaken && threadIdx.x == 0) tile[32] = 0.0f;
  __syncthreads();
  float sum = 0.0f;
  for (int i = 0; i < 33; ++i) sum += tile[i];
  out[threadIdx.x] = sum;
}

Case uninitialized("uninitialized", [](bool mistaken) {
  std::vector<float> out(32);
  launch_one(mistaken ? sum_tile<true> : sum_tile<false>, dim3(1), dim3(32), 33 * 4, nullptr, out.data());
  return out[0] == 32.0f;
});

}  // namespace
}  // namespace gistkern::broken
