// cp.async whose data is used too early, in four ways.
#include "case.h"

namespace gistkern::broken {
namespace {

constexpr int kLanes = 32;
constexpr int kTile = 4 * kLanes;  // floats a stage

enum class Mistake { kNone, kNoWait, kGroupTooMany, kNoCommit, kNoBarrier };

// out = in, in tiles through two stages of shared memory; what a thread reads another one has copied
template <Mistake kMistake>
__global__ void copy_staged(const float* in, float* out, int tiles) {
  float* stages = shared_memory<float>();  // [2, kTile]
  const auto start = [&](int tile) {
    const int place = 4 * threadIdx.x;
    if (tile < tiles) copy_async_16(stages + tile % 2 * kTile + place, in + tile * kTile + place, 16);
    if (kMistake != Mistake::kNoCommit || tile == 0) copy_async_commit();
  };
  start(0);
  for (int tile = 0; tile < tiles; ++tile) {
    start(tile + 1);
    if (kMistake == Mistake::kGroupTooMany) {
      copy_async_wait<2>();
    } else if (kMistake != Mistake::kNoWait) {
      copy_async_wait<1>();
    }
    if (kMistake != Mistake::kNoBarrier) __syncthreads();
    for (int i = threadIdx.x; i < kTile; i += kLanes) out[tile * kTile + i] = stages[tile % 2 * kTile + i];
    __syncthreads();
  }
}

template <Mistake kMistake>
bool staged_right(bool mistaken) {
  constexpr int kTiles = 4;
  std::vector<float> in = counting(kTiles * kTile), out(kTiles * kTile);
  launch_one(mistaken ? copy_staged<kMistake> : copy_staged<Mistake::kNone>, dim3(1), dim3(kLanes), 2 * kTile * 4,
             nullptr, in.data(), out.data(), kTiles);
  return out == in;
}

Case async_no_wait("async_no_wait", staged_right<Mistake::kNoWait>);
Case async_group_count("async_group_count", staged_right<Mistake::kGroupTooMany>);
Case async_no_commit("async_no_commit", staged_right<Mistake::kNoCommit>);
Case async_no_barrier("async_no_barrier", staged_right<Mistake::kNoBarrier>);

}  // namespace
}  // namespace gistkern::broken
