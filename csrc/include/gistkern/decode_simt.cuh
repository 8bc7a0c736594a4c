// Decoding without tensor cores: any head_dim up to 256, fp32 too; for few packed rows.
//
// A warp takes 32 / lanes columns side by side, each over `lanes` lanes that hold kElements elements of the row, and
// kColumns of them one after another, so that many loads are in flight. Every group of lanes keeps its own softmax; the
// groups of a warp merge by shuffles at the end, the warps through shared memory.
#pragma once

#include "gistkern/chunk.cuh"
#include "gistkern/decode_merge.cuh"

namespace gistkern {

// A lane's piece of a row whose elements are Ts or, where kQuantized, perhaps codes.
template <typename T, int kElements, bool kQuantized>
struct RowPiece {
  uint32_t words[kElements * sizeof(T) / 4] = {};

  __device__ __forceinline__ void load(const char* row, ElementType type, int first, int head_dim, bool aligned) {
    if constexpr (kQuantized) {
      if (holds_codes(type)) return load_chunk<1, kElements>(words, row, first, head_dim, aligned);
    }
    load_chunk<sizeof(T), kElements>(words, row, first, head_dim, aligned);
  }

  __device__ __forceinline__ void to_floats(float (&values)[kElements], ElementType type) const {
    if constexpr (kQuantized) {
      if (holds_codes(type)) return codes_to_floats(values, words, type);
    }
    chunk_to_floats(values, words, T());
  }
};

// One lane's pieces of the columns of a tile: kColumns of them, `groups` apart.
template <typename T, bool kQuantized>
struct SimtTile {
  static constexpr int kElements = simt_elements(kQuantized);
  static constexpr int kColumns = simt_columns(sizeof(T), kQuantized);

  RowPiece<T, kElements, kQuantized> key[kColumns], value[kColumns];
  ElementType key_type[kColumns], value_type[kColumns];
  float key_scale[kColumns], value_scale[kColumns];

  // Columns beyond the last stay zeros.
  __device__ __forceinline__ void load(const DecodeArguments& a, const DecodePlan& plan, const Sources& sources,
                                       const Unit& unit, const Window& window, int first_column, int groups,
                                       int first) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      int column = first_column + i * groups;
      bool is_gist = column < window.gist_count;
      key_type[i] = is_gist ? a.gist_key.type : a.tail_key.type;
      value_type[i] = is_gist ? a.gist_value.type : a.tail_value.type;
      key_scale[i] = value_scale[i] = 1.0f;
      if (column >= window.count) continue;
      Column at = column_at(a, unit, window, column);
      key[i].load(sources.keys.of(at), key_type[i], first, a.head_dim,
                  is_gist ? plan.gist_key_aligned : plan.tail_key_aligned);
      value[i].load(sources.values.of(at), value_type[i], first, a.head_dim,
                    is_gist ? plan.gist_value_aligned : plan.tail_value_aligned);
      if (kQuantized) {
        key_scale[i] = scale_of(sources.key_scales, a.gist_key, a.tail_key, at);
        value_scale[i] = scale_of(sources.value_scales, a.gist_value, a.tail_value, at);
      }
    }
  }
};

template <typename T, int kRows, bool kQuantized>
struct SimtState {
  using Tile = SimtTile<T, kQuantized>;
  static constexpr int kElements = Tile::kElements, kColumns = Tile::kColumns;

  float query[kRows][kElements];
  Sight sight[kRows];
  RunningSoftmax softmax[kRows];
  float output[kRows][kElements];

  __device__ __forceinline__ void load_query(const DecodeArguments& arguments, const DecodePlan& plan, const Unit& unit,
                                             const Window& window, int first) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      // a pack may hold fewer rows: the others repeat its last
      RowPlace at = row_place(arguments, unit, least(row, unit.rows - 1));
      sight[row] = window.in_columns(sight_of(arguments, unit.sequence, at.query_row));
      RowPiece<T, kElements, false> piece;
      const char* address = row_address(arguments.query, plan.query_stride, unit.sequence, at.head, at.query_row);
      piece.load(address, arguments.type, first, arguments.head_dim, plan.query_aligned);
      piece.to_floats(query[row], arguments.type);
    }
  }

  __device__ __forceinline__ void multiply_keys(float (&scores)[kRows][kColumns], const Tile& tile, int lanes) const {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      float elements[kElements];
      tile.key[i].to_floats(elements, tile.key_type[i]);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        float score = 0.0f;
#pragma unroll
        for (int e = 0; e < kElements; ++e) score = fmaf(query[row][e], elements[e], score);
        scores[row][i] = score * tile.key_scale[i];
      }
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          scores[row][i] += __shfl_xor_sync(0xffffffffu, scores[row][i], distance);
        }
      }
    }
  }

  __device__ __forceinline__ void softmax_rows(float (&scores)[kRows][kColumns], bool masked, int first_column,
                                               int groups, float scale_log2) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      float maximum = -INFINITY;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        if (masked && !sight[row].sees(first_column + i * groups)) scores[row][i] = -INFINITY;
        maximum = fmaxf(maximum, scores[row][i]);
      }
      float keep = softmax_step(scores[row], maximum, softmax[row], scale_log2);
#pragma unroll
      for (int e = 0; e < kElements; ++e) output[row][e] *= keep;
    }
  }

  __device__ __forceinline__ void multiply_values(const float (&scores)[kRows][kColumns], const Tile& tile) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      float elements[kElements];
      tile.value[i].to_floats(elements, tile.value_type[i]);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        float probability = scores[row][i] * tile.value_scale[i];
#pragma unroll
        for (int e = 0; e < kElements; ++e) output[row][e] = fmaf(probability, elements[e], output[row][e]);
      }
    }
  }

  // Adds up what the groups of lanes of a warp have; every group ends with the same.
  __device__ __forceinline__ void merge_groups(int lanes, float scale_log2) {
    for (int distance = lanes; distance < 32; distance *= 2) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        RunningSoftmax& mine = softmax[row];
        float other_maximum = __shfl_xor_sync(0xffffffffu, mine.maximum, distance);
        float other_sum = __shfl_xor_sync(0xffffffffu, mine.sum, distance);
        float maximum = fmaxf(mine.maximum, other_maximum);
        float weight = exponential(mine.maximum, maximum, scale_log2);
        float other_weight = exponential(other_maximum, maximum, scale_log2);
        mine.maximum = maximum;
        mine.sum = mine.sum * weight + other_sum * other_weight;
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          float other = __shfl_xor_sync(0xffffffffu, output[row][e], distance);
          output[row][e] = output[row][e] * weight + other * other_weight;
        }
      }
    }
  }

  // By the first group of lanes of a warp.
  __device__ __forceinline__ void store(const Partials& partials, int warp, int first) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (first == 0) partials.store_statistics(warp, row, sight[row].nothing() ? RunningSoftmax() : softmax[row]);
#pragma unroll
      for (int e = 0; e < kElements; e += 4) {
        float four[4] = {output[row][e], output[row][e + 1], output[row][e + 2], output[row][e + 3]};
        store_elements(partials.output(warp, row) + first + e, four);
      }
    }
  }
};

template <typename T, int kRows, bool kQuantized>
__global__ void __launch_bounds__(kSimtWarps * 32, simt_blocks(kRows, kQuantized))
    gist_decode_simt_kernel(const DecodeArguments arguments, const DecodePlan plan) {
  using Tile = SimtTile<T, kQuantized>;
  Place place = place_of(plan);
  await_earlier_launches();
  if (place.unit >= plan.units) return;  // only where units do not share a block's barrier
  Unit unit = unit_of(place.unit, arguments, plan);
  Window window = window_of(arguments, unit);
  int lane = threadIdx.x % 32, groups = 32 / plan.lanes, group = lane / plan.lanes;
  int first = lane % plan.lanes * Tile::kElements;
  float scale_log2 = arguments.scale * kLog2E;
  SimtState<T, kRows, kQuantized> state = {};
  state.load_query(arguments, plan, unit, window, first);

  Sources sources = sources_of(arguments, plan, unit, window);
  int tile_columns = groups * Tile::kColumns;
  TileRange tiles = tiles_of(window, tile_columns, place.split, plan.splits);
  for (int index = tiles.begin + place.member; index < tiles.end; index += plan.warps_per_unit) {
    int first_column = index * tile_columns + group;
    Tile tile;
    tile.load(arguments, plan, sources, unit, window, first_column, groups, first);
    float scores[kRows][Tile::kColumns];
    state.multiply_keys(scores, tile, plan.lanes);
    state.softmax_rows(scores, (index + 1) * tile_columns > window.full, first_column, groups, scale_log2);
    state.multiply_values(scores, tile);
  }

  state.merge_groups(plan.lanes, scale_log2);
  Partials partials = {shared_memory<float>(), partial_floats(kRows, plan.width), kRows, plan.width};
  if (group == 0) state.store(partials, threadIdx.x / 32, first);
  int split = blockIdx.x / plan.blocks;  // place.split again: its register is dear in the loop
  finish_unit<T, kSimtWarps>(arguments, plan, unit, partials, split);
}

}  // namespace gistkern
