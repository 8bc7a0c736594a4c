// One warp's queue of key and value tiles: copies run ahead of their use, in the order key 0, value 0, key 1, ...
#pragma once

#include "gistkern/columns.cuh"
#include "gistkern/tile.cuh"

namespace gistkern {

// Tile `index` of a warp is its index-th: column tile first_tile + index * tile_step of the unit, of `count`. Requests
// beyond the last copy nothing, but count as a group, so the number of groups in flight is always the same.
template <typename T, int kWidth, bool kQuantized>
struct TilePipeline {
  static constexpr int kColumns = mma_columns(kWidth);
  using Layout = Tile<kColumns, kWidth>;

  const DecodeArguments& arguments;
  const Unit& unit;
  const Window& window;
  char* memory;  // [kMmaStages][key, value] tiles
  int first_tile, tile_step, count;
  Sources sources;

  Column copied = {};  // column `lane` of the tile whose keys were requested last
  // Scales of column `lane` of the current tile and of those requested, in order. They are loaded well before their
  // use.
  float key_scale[kMmaStages] = {}, value_scale[kMmaStages] = {};

  __device__ __forceinline__ TilePipeline(const DecodeArguments& arguments, const DecodePlan& plan, const Unit& unit,
                                          const Window& window, char* memory, int first_tile, int tile_step,
                                          int end_tile)
      : arguments(arguments),
        unit(unit),
        window(window),
        memory(memory),
        first_tile(first_tile),
        tile_step(tile_step),
        count((greatest(end_tile - first_tile, 0) + tile_step - 1) / tile_step),
        sources(sources_of(arguments, plan, unit, window)) {}

  __device__ __forceinline__ int first_column(int index) const { return (first_tile + index * tile_step) * kColumns; }
  __device__ __forceinline__ char* key_tile(int index) const {
    return memory + index % kMmaStages * 2 * Layout::kBytes;
  }
  __device__ __forceinline__ char* value_tile(int index) const { return key_tile(index) + Layout::kBytes; }

  __device__ __forceinline__ TileTypes types(int index, const Rows& gist, const Rows& tail) const {
    return {window.gist_count - first_column(index), gist.type, tail.type};
  }

  __device__ __forceinline__ void request_key(int index) {
    if (kQuantized) {
#pragma unroll
      for (int stage = 0; stage + 1 < kMmaStages; ++stage) {
        key_scale[stage] = key_scale[stage + 1];
        value_scale[stage] = value_scale[stage + 1];
      }
    }
    if (index < count) {
      int column = first_column(index) + threadIdx.x % 32 % kColumns;
      // lanes beyond the last column stay on it: its address is valid and nothing is copied for them
      copied = column_at(arguments, unit, window, least(column, window.count - 1));
      copy_tile<kColumns, kWidth, kQuantized>(key_tile(index), sources.keys.of(copied),
                                              window.count - first_column(index), arguments.head_dim,
                                              types(index, arguments.gist_key, arguments.tail_key));
      if (kQuantized) {
        key_scale[kMmaStages - 1] = scale_of(sources.key_scales, arguments.gist_key, arguments.tail_key, copied);
        value_scale[kMmaStages - 1] =
            scale_of(sources.value_scales, arguments.gist_value, arguments.tail_value, copied);
      }
    }
    copy_async_commit();
  }

  // Of the tile whose keys were requested last.
  __device__ __forceinline__ void request_value(int index) {
    if (index < count) {
      copy_tile<kColumns, kWidth, kQuantized>(value_tile(index), sources.values.of(copied),
                                              window.count - first_column(index), arguments.head_dim,
                                              types(index, arguments.gist_value, arguments.tail_value));
    }
    copy_async_commit();
  }

  // Fills the queue; the value tile of the last stage stays free until the first request_value of the loop.
  __device__ __forceinline__ void fill() {
#pragma unroll
    for (int stage = 0; stage < kMmaStages; ++stage) {
      request_key(stage);
      if (stage + 1 < kMmaStages) request_value(stage);
    }
  }

  // The next tile of the queue is there for all lanes, and all lanes are done with the one before it.
  __device__ __forceinline__ void await_next() {
    copy_async_wait<2 * kMmaStages - 2>();
    __syncwarp();
  }
};

}  // namespace gistkern
