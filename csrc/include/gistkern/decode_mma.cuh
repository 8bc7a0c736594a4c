// Decoding on tensor cores: up to 16 packed rows of one sequence and K/V head against tiles of columns.
//
// The column tiles are shared out among the warps of a unit. Each warp copies its own tiles, runs its own softmax over
// them and needs no other warp until the end, when partial results merge through shared memory.
//
// Fragments of mma.m16n8k16: a lane holds, of row lane / 4 and row lane / 4 + 8, columns 2 * (lane % 4) and the next
// one of every 8 columns of scores and outputs.
#pragma once

#include "gistkern/decode_merge.cuh"
#include "gistkern/pipeline.cuh"

namespace gistkern {

// Two B operands [16, 8] of which each one takes two registers: columns 0..8 and 8..16 of 16.
template <typename T>
__device__ __forceinline__ void mma_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
  uint32_t b_left[2] = {b[0], b[1]}, b_right[2] = {b[2], b[3]};
  mma_16816(left, a, b_left, T());
  mma_16816(right, a, b_right, T());
}

template <typename T, int kWidth, bool kQuantized>
struct MmaWarp {
  static constexpr int kColumns = mma_columns(kWidth);
  using Layout = Tile<kColumns, kWidth>;

  int lane;
  const char* query_tile;          // where the query is kept in shared memory
  uint32_t query[kWidth / 16][4];  // [16, kWidth], where it is kept in registers
  Sight sight[2];                  // of this lane's two rows
  RunningSoftmax softmax[2];       // their sums are of this lane's columns only
  float output[kWidth / 8][4];     // [16, kWidth], in units of value_unit
  // Codes of values are multiplied by their scale through the probabilities. In units of the largest scale so far,
  // rounded to a power of two, these stay in the range of fp16 however small the scales are.
  float value_unit;

  __device__ __forceinline__ void load_query(uint32_t (&fragment)[4], int k) const {
    load_matrix_x4(fragment, query_tile + Tile<kMmaRows, kWidth>::offset(lane % 16, 2 * k + lane / 16));
  }

  // scores[half][2 * n + i]: of column 8 * n + 2 * (lane % 4) + i
  __device__ __forceinline__ void multiply_keys(float (&scores)[2][kColumns / 4], const char* tile) {
    float products[kColumns / 8][4] = {};
    int row = lane % 8 + lane / 16 * 8, chunk = lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) {
      if (mma_keeps_query(kWidth)) load_query(query[k], k);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t keys[4];  // [16 columns, 16 of kWidth]
        load_matrix_x4(keys, tile + Layout::offset(16 * n + row, 2 * k + chunk));
        mma_pair<T>(products[2 * n], products[2 * n + 1], query[k], keys);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[i / 2][2 * n + i % 2] = products[n][i];
    }
  }

  // Multiplies what this lane holds of each column by the factor that lane `column` holds of it.
  __device__ __forceinline__ void scale_columns(float (&scores)[2][kColumns / 4], float factor) const {
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      float of_column = __shfl_sync(0xffffffffu, factor, i / 2 * 8 + lane % 4 * 2 + i % 2);
      scores[0][i] *= of_column;
      scores[1][i] *= of_column;
    }
  }

  // Scores become probabilities; `keep` are the factors for the two rows' outputs.
  __device__ __forceinline__ void softmax_rows(float (&scores)[2][kColumns / 4], float (&keep)[2], int first_column,
                                               int full, float scale_log2) {
    bool masked = first_column + kColumns > full;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float maximum = -INFINITY;
#pragma unroll
      for (int i = 0; i < kColumns / 4; ++i) {
        int column = first_column + i / 2 * 8 + lane % 4 * 2 + i % 2;
        if (masked && !sight[half].sees(column)) scores[half][i] = -INFINITY;
        maximum = fmaxf(maximum, scores[half][i]);
      }
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
      maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
      keep[half] = softmax_step(scores[half], maximum, softmax[half], scale_log2);
    }
  }

  // Folds the tile's value scales (lane `column` has that of its column) into probabilities and `keep`.
  __device__ __forceinline__ void scale_values(float (&scores)[2][kColumns / 4], float (&keep)[2], float scale) {
    // a power of two: its inverse is exact
    float unit = fmaxf(value_unit, bits_as<float>(bits_as<uint32_t>(scale) & 0x7f800000u));
    for (int distance = 16; distance > 0; distance /= 2) {
      unit = fmaxf(unit, __shfl_xor_sync(0xffffffffu, unit, distance));
    }
    float inverse = bits_as<float>(0x7f000000u - bits_as<uint32_t>(unit));
    scale_columns(scores, scale * inverse);
    keep[0] *= value_unit * inverse;
    keep[1] *= value_unit * inverse;
    value_unit = unit;
  }

  __device__ __forceinline__ void multiply_values(const float (&scores)[2][kColumns / 4], const float (&keep)[2],
                                                  const char* tile) {
    // maxima seldom rise after the first tiles
    if (__ballot_sync(0xffffffffu, keep[0] != 1.0f || keep[1] != 1.0f) != 0) {
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) output[n][i] *= keep[i / 2];
      }
    }
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      // the scores' fragment is that of an A operand, two columns to a register
      uint32_t probabilities[4];  // [16, 16 columns]
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int at = 4 * k + i / 2 * 2;
        probabilities[i] = pack_floats<T>(scores[i % 2][at], scores[i % 2][at + 1]);
      }
#pragma unroll
      for (int n = 0; n < kWidth / 16; ++n) {
        uint32_t values[4];  // [16 columns, 16 of kWidth]
        load_matrix_x4_trans(values, tile + Layout::offset(16 * k + lane % 16, 2 * n + lane / 16));
        mma_pair<T>(output[2 * n], output[2 * n + 1], probabilities, values);
      }
    }
  }

  __device__ __forceinline__ void store(const Partials& partials, int warp) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RunningSoftmax state = softmax[half];
      state.sum += __shfl_xor_sync(0xffffffffu, state.sum, 1);
      state.sum += __shfl_xor_sync(0xffffffffu, state.sum, 2);
      if (sight[half].nothing()) state = {};
      int row = lane / 4 + 8 * half;
      if (lane % 4 == 0) partials.store_statistics(warp, row, state);
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
        float unit = kQuantized ? value_unit : 1.0f;
        *reinterpret_cast<float2*>(partials.output(warp, row) + 8 * n + lane % 4 * 2) =
            make_float2(output[n][2 * half] * unit, output[n][2 * half + 1] * unit);
      }
    }
  }
};

template <typename T, int kWidth, bool kQuantized>
__global__ void __launch_bounds__(mma_warps(kWidth) * 32)
    gist_decode_mma_kernel(const DecodeArguments arguments, const DecodePlan plan) {
  using Pipeline = TilePipeline<T, kWidth, kQuantized>;
  constexpr int kWarpBytes = mma_warp_bytes(kWidth);
  static_assert(partial_floats(kMmaRows, kWidth) * 4 <= kWarpBytes, "partial results take the place of tiles");
  static_assert(kMmaRows <= Pipeline::kColumns, "the query takes the place of a value tile");
  constexpr float kSmallest = 1.17549435e-38f;
  Place place = place_of(plan);
  await_earlier_launches();
  if (place.unit >= plan.units) return;  // only where units do not share a block's barrier
  Unit unit = unit_of(place.unit, arguments, plan);
  Window window = window_of(arguments, unit);
  int warp = threadIdx.x / 32;
  TileRange tiles = tiles_of(window, Pipeline::kColumns, place.split, plan.splits);
  char* memory = shared_memory<char>() + warp * kWarpBytes;
  Pipeline pipeline(arguments, plan, unit, window, memory, tiles.begin + place.member, plan.warps_per_unit, tiles.end);
  MmaWarp<T, kWidth, kQuantized> state = {};
  state.lane = threadIdx.x % 32;
  state.value_unit = kSmallest;

  // the query comes to its own place, or on its way to the registers to the one tile that the queue does not fill
  char* query_tile =
      mma_keeps_query(kWidth) ? memory + kWarpBytes - kMmaRows * kWidth * 2 : pipeline.value_tile(kMmaStages - 1);
  RowPlace at = row_place(arguments, unit, least(state.lane % 16, unit.rows - 1));
  copy_tile<kMmaRows, kWidth, false>(
      query_tile, row_address(arguments.query, plan.query_stride, unit.sequence, at.head, at.query_row), unit.rows,
      arguments.head_dim, {});
  copy_async_commit();
  pipeline.fill();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int row = least(state.lane / 4 + 8 * half, unit.rows - 1);
    int query_row = row_place(arguments, unit, row).query_row;
    state.sight[half] = window.in_columns(sight_of(arguments, unit.sequence, query_row));
  }
  copy_async_wait<2 * kMmaStages - 1>();
  __syncwarp();
  state.query_tile = query_tile;
  if (!mma_keeps_query(kWidth)) {
#pragma unroll
    for (int k = 0; k < kWidth / 16; ++k) state.load_query(state.query[k], k);
  }

  for (int index = 0; index < pipeline.count; ++index) {
    float scores[2][Pipeline::kColumns / 4], keep[2];
    pipeline.await_next();
    pipeline.request_value(index + kMmaStages - 1);
    if (kQuantized) {
      widen_tile<T, Pipeline::kColumns, kWidth>(pipeline.key_tile(index),
                                                pipeline.types(index, arguments.gist_key, arguments.tail_key));
    }
    state.multiply_keys(scores, pipeline.key_tile(index));
    if (kQuantized) state.scale_columns(scores, pipeline.key_scale[0]);
    state.softmax_rows(scores, keep, pipeline.first_column(index), window.full, arguments.scale * kLog2E);
    if (kQuantized) state.scale_values(scores, keep, pipeline.value_scale[0]);
    pipeline.await_next();
    pipeline.request_key(index + kMmaStages);
    if (kQuantized) {
      widen_tile<T, Pipeline::kColumns, kWidth>(pipeline.value_tile(index),
                                                pipeline.types(index, arguments.gist_value, arguments.tail_value));
    }
    state.multiply_values(scores, keep, pipeline.value_tile(index));
  }

  copy_async_wait<0>();
  __syncwarp();
  Partials partials = {shared_memory<float>(), kWarpBytes / 4, kMmaRows, kWidth};
  state.store(partials, warp);
  finish_unit<T, mma_warps(kWidth)>(arguments, plan, unit, partials, place.split);
}

}  // namespace gistkern
