// Two blocks write the same element. One after the other they even agree on the value.
#include "case.h"

namespace gistkern::broken {
namespace {

template <bool kMistaken>
__global__ void write_block(float* out) {
  if (threadIdx.x == 0) out[kMistaken ? 0 : blockIdx.x] = 1.0f;
}

Case block_race("block_race", [](bool mistaken) {
  std::vector<float> out(4);
  launch_one(mistaken ? write_block<true> : write_block<false>, dim3(4), dim3(32), 0, nullptr, out.data());
  return out[0] == 1.0f;
});

}  // namespace
}  // namespace gistkern::broken
