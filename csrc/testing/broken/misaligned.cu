// 128-bit accesses at addresses that are not multiples of 16 bytes.
#include "case.h"

namespace gistkern::broken {
namespace {

__global__ void load_vector(const float* in, uint4* out) { out[threadIdx.x] = load_128(in + 4 * threadIdx.x); }
__global__ void store_vector(const uint4* in, float* out) { store_128(out + 4 * threadIdx.x, in[threadIdx.x]); }
__global__ void load_pointer(const float* in, uint4* out) {
  out[threadIdx.x] = *reinterpret_cast<const uint4*>(in + 4 * threadIdx.x);
}
__global__ void copy_vector(const float* in, uint4* out) {
  uint4* tile = shared_memory<uint4>();  // [32]
  copy_async_16(tile + threadIdx.x, in + 4 * threadIdx.x, 16);
  copy_async_commit();
  copy_async_wait<0>();
  out[threadIdx.x] = tile[threadIdx.x];
}

// one float too far when mistaken
template <typename In, typename Out>
bool moved_right(void (*kernel)(const In*, Out*), bool in_mistaken, bool out_mistaken) {
  const std::unique_ptr<uint4[]> in(new uint4[33]()), out(new uint4[33]());
  float* const source = reinterpret_cast<float*>(in.get()) + in_mistaken;
  float* const destination = reinterpret_cast<float*>(out.get()) + out_mistaken;
  for (int i = 0; i < 128; ++i) source[i] = i;
  launch_one(kernel, dim3(1), dim3(32), 32 * 16, nullptr, reinterpret_cast<const In*>(source),
             reinterpret_cast<Out*>(destination));
  return std::memcmp(source, destination, 128 * 4) == 0;
}

Case misaligned_load("misaligned_load", [](bool mistaken) { return moved_right(load_vector, mistaken, false); });
Case misaligned_store("misaligned_store", [](bool mistaken) { return moved_right(store_vector, false, mistaken); });
Case misaligned_pointer("misaligned_pointer", [](bool mistaken) { return moved_right(load_pointer, mistaken, false); });
Case misaligned_copy("misaligned_copy", [](bool mistaken) { return moved_right(copy_vector, mistaken, false); });

}  // namespace
}  // namespace gistkern::broken
