// The last block of a launch adds up what all blocks have written.
#include "case.h"

namespace gistkern::broken {
namespace {

constexpr int kWidth = 64;
enum class Arrival { kNone, kNoOrder, kNoBarrier, kCount };

// sum = of parts[block] over all blocks, each element by its thread; parts [blocks, kWidth] are written here
template <Arrival kMistake>
__global__ void sum_blocks(float* parts, float* sum, uint32_t* count) {
  parts[blockIdx.x * kWidth + threadIdx.x] = static_cast<float>(blockIdx.x);
  if (kMistake != Arrival::kNoBarrier) __syncthreads();
  uint32_t others = gridDim.x - 1;
  bool last = false;
  if (threadIdx.x == 0) {
    uint32_t before = kMistake == Arrival::kNoOrder ? __atomic_fetch_add(count, 1, __ATOMIC_RELAXED)
                                                    : arrive(count, kMistake == Arrival::kCount ? others + 1 : others);
    last = before == others;
  }
  if (!__syncthreads_or(last)) return;
  float total = 0.0f;
  for (uint32_t block = 0; block < gridDim.x; ++block) total += parts[block * kWidth + threadIdx.x];
  sum[threadIdx.x] = total;
}

template <Arrival kMistake>
bool sums_are_right(bool mistaken) {
  constexpr int kBlocks = 5;
  uint32_t count = 0;
  for (int launches = 0; launches < 2; ++launches) {  // the count must be zero again
    std::vector<float> parts(kBlocks * kWidth), sum(kWidth, -1.0f);
    launch_one(mistaken ? sum_blocks<kMistake> : sum_blocks<Arrival::kNone>, dim3(kBlocks), dim3(kWidth), 0, nullptr,
               parts.data(), sum.data(), &count);
    if (sum != std::vector<float>(kWidth, 10.0f)) return false;
    if (kMistake == Arrival::kNoOrder && mistaken) count = 0;
  }
  return true;
}

Case arrival_no_order("arrival_no_order", sums_are_right<Arrival::kNoOrder>);
Case arrival_no_barrier("arrival_no_barrier", sums_are_right<Arrival::kNoBarrier>);
Case arrival_count("arrival_count", sums_are_right<Arrival::kCount>);

// out = in, by a launch that starts early
__global__ void copy_early(const uint4* in, uint4* out, bool waits, bool waits_late) {
  if (waits && !waits_late) await_earlier_launches();
  uint4 value = waits_late ? load_128(in + threadIdx.x) : in[threadIdx.x];
  if (waits_late) await_earlier_launches();
  out[threadIdx.x] = value;
}

bool copy_is_right(bool waits, bool waits_late) {
  std::vector<float> in = counting(4 * kWidth), out(4 * kWidth);
  auto from = reinterpret_cast<const uint4*>(in.data());
  const char* error = launch_early(copy_early, dim3(1), dim3(kWidth), 0, nullptr, from,
                                   reinterpret_cast<uint4*>(out.data()), waits, waits_late);
  return error == nullptr && in == out;
}

Case early_no_wait("early_no_wait", [](bool mistaken) { return copy_is_right(!mistaken, false); });
Case early_late_wait("early_late_wait", [](bool mistaken) { return copy_is_right(true, mistaken); });

}  // namespace
}  // namespace gistkern::broken
