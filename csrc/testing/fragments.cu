// One warp of the decode kernel's own steps around ldmatrix and mma, from and to plain arrays, so that
// tests/csrc/test_fragments.py can compare which lane holds what with CuTe's layouts. All return launch()'s error.
#include "gistkern/decode_mma.cuh"

namespace gistkern {
namespace {

// registers [32, 4] of an ldmatrix.x4 whose lane l gives the address of piece l of the 32 in memory
__global__ void load_matrices(const uint4* memory, uint32_t* registers, bool transposed) {
  uint4* tile = shared_memory<uint4>();
  int lane = threadIdx.x;
  tile[lane] = memory[lane];
  __syncwarp();
  uint32_t loaded[4];
  if (transposed) {
    load_matrix_x4_trans(loaded, tile + lane);
  } else {
    load_matrix_x4(loaded, tile + lane);
  }
  for (int i = 0; i < 4; ++i) registers[lane * 4 + i] = loaded[i];
}

// rows [kRows, kWidth] into a tile as copy_tile leaves it
template <int kRows, int kWidth>
__device__ void fill_tile(char* tile, const uint4* rows) {
  using Layout = Tile<kRows, kWidth>;
  for (int i = threadIdx.x; i < kRows * Layout::kChunks; i += 32) {
    *reinterpret_cast<uint4*>(tile + Layout::offset(i / Layout::kChunks, i % Layout::kChunks)) = rows[i];
  }
  __syncwarp();
}

// fragments [32, kWidth / 16, 4] of query [16, kWidth]
template <int kWidth>
__global__ void load_queries(const uint4* query, uint32_t* fragments) {
  fill_tile<kMmaRows, kWidth>(shared_memory<char>(), query);
  MmaWarp<half, kWidth, false> state = {};
  state.lane = threadIdx.x;
  state.query_tile = shared_memory<char>();
  for (int k = 0; k < kWidth / 16; ++k) {
    uint32_t fragment[4];
    state.load_query(fragment, k);
    for (int i = 0; i < 4; ++i) fragments[(state.lane * kWidth / 16 + k) * 4 + i] = fragment[i];
  }
}

// scores [32, 2, columns / 4] from query fragments and keys [columns, kWidth]
template <typename T, int kWidth>
__global__ void multiply_keys(const uint32_t* fragments, const uint4* keys, float* scores) {
  using Warp = MmaWarp<T, kWidth, false>;
  fill_tile<Warp::kColumns, kWidth>(shared_memory<char>(), keys);
  Warp state = {};
  state.lane = threadIdx.x;
  for (int i = 0; i < kWidth / 4; ++i) state.query[i / 4][i % 4] = fragments[state.lane * kWidth / 4 + i];
  float found[2][Warp::kColumns / 4];
  state.multiply_keys(found, shared_memory<char>());
  for (int i = 0; i < Warp::kColumns / 2; ++i) {
    scores[state.lane * Warp::kColumns / 2 + i] = found[i / (Warp::kColumns / 4)][i % (Warp::kColumns / 4)];
  }
}

// outputs [32, kWidth / 8, 4] from probabilities [32, 2, columns / 4] and values [columns, kWidth]
template <typename T, int kWidth>
__global__ void multiply_values(const float* probabilities, const uint4* values, float* outputs) {
  using Warp = MmaWarp<T, kWidth, false>;
  fill_tile<Warp::kColumns, kWidth>(shared_memory<char>(), values);
  Warp state = {};
  state.lane = threadIdx.x;
  float given[2][Warp::kColumns / 4];
  for (int i = 0; i < Warp::kColumns / 2; ++i) {
    given[i / (Warp::kColumns / 4)][i % (Warp::kColumns / 4)] = probabilities[state.lane * Warp::kColumns / 2 + i];
  }
  state.multiply_values(given, {1.0f, 1.0f}, shared_memory<char>());
  for (int i = 0; i < kWidth / 2; ++i) outputs[state.lane * kWidth / 2 + i] = state.output[i / 4][i % 4];
}

template <typename... Parameters, typename... Arguments>
const char* run_warp(void (*kernel)(Parameters...), int shared_bytes, Arguments... arguments) {
  return launch(kernel, dim3(1), dim3(32), shared_bytes, nullptr, arguments...);
}

template <int kWidth>
const char* run_keys(bool bfloat16, const uint32_t* fragments, const uint4* keys, float* scores) {
  auto kernel = bfloat16 ? multiply_keys<__nv_bfloat16, kWidth> : multiply_keys<half, kWidth>;
  return run_warp(kernel, mma_tile_bytes(kWidth), fragments, keys, scores);
}

template <int kWidth>
const char* run_values(bool bfloat16, const float* probabilities, const uint4* values, float* outputs) {
  auto kernel = bfloat16 ? multiply_values<__nv_bfloat16, kWidth> : multiply_values<half, kWidth>;
  return run_warp(kernel, mma_tile_bytes(kWidth), probabilities, values, outputs);
}

}  // namespace

extern "C" {

const char* run_load_matrices(const uint4* memory, uint32_t* registers, bool transposed) {
  return run_warp(load_matrices, 512, memory, registers, transposed);
}

const char* run_load_queries(int width, const uint4* query, uint32_t* fragments) {
  auto kernel = width == 64 ? load_queries<64> : load_queries<128>;
  return run_warp(kernel, kMmaRows * width * 2, query, fragments);
}

const char* run_multiply_keys(int width, bool bfloat16, const uint32_t* fragments, const uint4* keys, float* scores) {
  return width == 64 ? run_keys<64>(bfloat16, fragments, keys, scores)
                     : run_keys<128>(bfloat16, fragments, keys, scores);
}

const char* run_multiply_values(int width, bool bfloat16, const float* probabilities, const uint4* values,
                                float* outputs) {
  return width == 64 ? run_values<64>(bfloat16, probabilities, values, outputs)
                     : run_values<128>(bfloat16, probabilities, values, outputs);
}
}

}  // namespace gistkern
