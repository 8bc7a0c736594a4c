// The online softmax (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"), once for every loop.
//
// Maxima are of raw scores and scale_log2 = scale * log2(e) with scale > 0. The difference to the maximum is formed
// before it is scaled: that costs one instruction more than a fused multiply-add and keeps fp32 exact to the last
// places.
#pragma once

#include <cmath>

#include "gistkern/port.cuh"

namespace gistkern {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct RunningSoftmax {
  float maximum = -INFINITY;
  float sum = 0.0f;
};

// exp(scale * (score - maximum)); 0 for a score of -inf, also where nothing has been seen yet.
__device__ __forceinline__ float exponential(float score, float maximum, float scale_log2) {
  float safe = maximum == -INFINITY ? 0.0f : maximum;
  return exp2_fast((score - safe) * scale_log2);
}

// Turns the scores of one row (-inf where unseen) into probabilities, and returns the factor for what this row has
// accumulated so far. `tile_maximum` is that of all scores of the tile; a thread that holds only some of them adds up
// its own.
template <int kScores>
__device__ __forceinline__ float softmax_step(float (&scores)[kScores], float tile_maximum, RunningSoftmax& state,
                                              float scale_log2) {
  float maximum = fmaxf(state.maximum, tile_maximum);
  float keep = exponential(state.maximum, maximum, scale_log2);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    scores[i] = exponential(scores[i], maximum, scale_log2);
    sum += scores[i];
  }
  state.maximum = maximum;
  state.sum = state.sum * keep + sum;
  return keep;
}

// Natural-log LSE of a row; -inf where it saw nothing.
__device__ __forceinline__ float log_sum_exp(RunningSoftmax state, float scale) {
  return state.sum == 0.0f ? -INFINITY : fmaf(state.maximum, scale, log2_fast(state.sum) * kLn2);
}

// The factor that makes an output of what a row has accumulated; 0 where it saw nothing.
__device__ __forceinline__ float normalizer(RunningSoftmax state) {
  return state.sum == 0.0f ? 0.0f : 1.0f / state.sum;
}

}  // namespace gistkern
