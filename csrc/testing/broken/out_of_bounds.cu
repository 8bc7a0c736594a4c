// One element too far: in global memory, in shared memory, and in an ldmatrix row.
#include "case.h"

namespace gistkern::broken {
namespace {

template <bool kMistaken>
__global__ void copy(const float* in, float* out, int in_count, int out_count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= out_count) return;
  out[i] = i < in_count + kMistaken ? in[i] : 0.0f;
}

Case global_read("global_read", [](bool mistaken) {
  std::vector<float> in = counting(100), out(128);
  launch_one(mistaken ? copy<true> : copy<false>, dim3(2), dim3(64), 0, nullptr, in.data(), out.data(), 100, 128);
  return out[99] == 99.0f;
});

Case global_write("global_write", [](bool mistaken) {
  std::vector<float> in = counting(128), out(100);
  launch_one(copy<false>, dim3(2), dim3(64), 0, nullptr, in.data(), out.data(), 128, 100 + mistaken);
  return out[99] == 99.0f;
});

template <bool kMistaken>
__global__ void shift(float* out) {
  float* tile = shared_memory<float>();  // [64]
  tile[threadIdx.x + kMistaken] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

Case shared_write("shared_write", [](bool mistaken) {
  std::vector<float> out(64);
  launch_one(mistaken ? shift<true> : shift<false>, dim3(1), dim3(64), 64 * 4, nullptr, out.data());
  return out[63] == 63.0f;
});

__global__ void touch_nothing(float* out, bool mistaken) { out[0] = mistaken ? shared_memory<float>()[0] : 1.0f; }

Case no_shared("no_shared", [](bool mistaken) {
  std::vector<float> out(1);
  launch_one(touch_nothing, dim3(1), dim3(1), 0, nullptr, out.data(), mistaken);
  return out[0] == 1.0f;
});

__global__ void load_rows(uint32_t* out, int row_bytes) {
  char* tile = shared_memory<char>();  // [32] rows of 16 bytes
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(tile)[threadIdx.x * 4 + i] = threadIdx.x;
  __syncwarp();
  uint32_t matrices[4];
  load_matrix_x4(matrices, tile + threadIdx.x * row_bytes);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = matrices[i];
}

bool load_rows_right(int row_bytes) {
  std::vector<uint32_t> out(128);
  launch_one(load_rows, dim3(1), dim3(32), 32 * 16, nullptr, out.data(), row_bytes);
  return out[4 * 31 + 3] == 31;
}

Case ldmatrix_bounds("ldmatrix_bounds", [](bool mistaken) { return load_rows_right(mistaken ? 32 : 16); });
Case ldmatrix_alignment("ldmatrix_alignment", [](bool mistaken) { return load_rows_right(mistaken ? 12 : 16); });

}  // namespace
}  // namespace gistkern::broken
