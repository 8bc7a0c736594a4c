// Small kernels whose results tests/csrc/test_emulator.py compares with what CUDA documents. All return launch()'s
// error.
#include "emulator.h"

namespace gistkern {
namespace {

// d += a b for one warp, from and to registers: a [32, 4], b [32, 2], d [32, 4]
template <typename Tag>
__global__ void multiply_fragments(const uint32_t* a, const uint32_t* b, float* d) {
  uint32_t a_registers[4], b_registers[2];
  float d_registers[4];
  for (int i = 0; i < 4; ++i) a_registers[i] = a[threadIdx.x * 4 + i];
  for (int i = 0; i < 2; ++i) b_registers[i] = b[threadIdx.x * 2 + i];
  for (int i = 0; i < 4; ++i) d_registers[i] = d[threadIdx.x * 4 + i];
  mma_16816(d_registers, a_registers, b_registers, Tag{});
  for (int i = 0; i < 4; ++i) d[threadIdx.x * 4 + i] = d_registers[i];
}

// d [16, 16] = a [16, 16] b, b [16 (k), 16] row-major as values are, or [16, 16 (k)] as keys are, both by ldmatrix
template <typename Tag>
__global__ void multiply_tiles(const uint4* a, const uint4* b, float* d, bool b_is_transposed) {
  uint4* tiles = shared_memory<uint4>();  // a: [16, 2], b: [16, 2] of 8 elements
  copy_async_16(tiles + threadIdx.x, a + threadIdx.x, 16);
  copy_async_16(tiles + 32 + threadIdx.x, b + threadIdx.x, 16);
  copy_async_commit();
  copy_async_wait<0>();
  __syncwarp();
  const uint4* const b_tile = tiles + 32;
  const int lane = threadIdx.x, row = lane % 8, matrix = lane / 8;
  uint32_t a_registers[4], b_registers[4];
  load_matrix_x4(a_registers, tiles + (row + matrix % 2 * 8) * 2 + matrix / 2);
  // matrices: (k 0-7, n 0-7), (k 8-15, n 0-7), (k 0-7, n 8-15), (k 8-15, n 8-15)
  if (b_is_transposed) {
    load_matrix_x4(b_registers, b_tile + (row + matrix / 2 * 8) * 2 + matrix % 2);
  } else {
    load_matrix_x4_trans(b_registers, b_tile + (row + matrix % 2 * 8) * 2 + matrix / 2);
  }
  for (int half = 0; half < 2; ++half) {
    float d_registers[4] = {};
    mma_16816(d_registers, a_registers, {b_registers[2 * half], b_registers[2 * half + 1]}, Tag{});
    for (int i = 0; i < 4; ++i) {
      d[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = d_registers[i];
    }
  }
}

// One x4 load from rows of row_bytes, 16-byte chunks exchanged by the row's number when swizzled.
__global__ void load_tile(uint32_t* out, int row_bytes, bool swizzled) {
  char* tile = shared_memory<char>();  // [32] rows
  const int lane = threadIdx.x, chunk = swizzled ? lane % 8 : 0;
  uint32_t matrices[4];
  load_matrix_x4(matrices, tile + lane * row_bytes + chunk * 16);
  for (int i = 0; i < 4; ++i) out[lane * 4 + i] = matrices[i];
}

// values [5, 32]: the lane's own, xor 5, from lane 3, 4 lanes down, ballot of odd values
__global__ void exchange_lanes(int* values) {
  const int lane = threadIdx.x, mine = values[lane];
  constexpr uint32_t kAll = 0xffffffffu;
  values[32 + lane] = __shfl_xor_sync(kAll, mine, 5);
  values[64 + lane] = __shfl_sync(kAll, mine, 3);
  values[96 + lane] = __shfl_down_sync(kAll, mine, 4);
  values[128 + lane] = __ballot_sync(kAll, mine % 2);
}

// Every thread's place in the grid, [blocks, threads, 6].
__global__ void write_indices(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* const mine = out + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 6;
  mine[0] = blockIdx.x, mine[1] = blockIdx.y, mine[2] = blockIdx.z;
  mine[3] = threadIdx.x, mine[4] = threadIdx.y, mine[5] = threadIdx.z;
}

// order[i]: the number of the block that ran as the i-th
__global__ void write_order(int* order, int* count) { order[(*count)++] = blockIdx.x; }

// A copy of 16 bytes of which `valid` come from in; before and after its wait.
__global__ void copy_some(const uint4* in, uint4* out, int valid) {
  uint4* tile = shared_memory<uint4>();
  tile[0] = in[0];
  copy_async_16(tile, in, valid);
  copy_async_commit();
  out[0] = tile[0];
  copy_async_wait<0>();
  out[1] = tile[0];
}

__global__ void skip_barrier() {
  if (threadIdx.x > 0) __syncthreads();
}

}  // namespace

extern "C" {

const char* run_multiply_fragments(bool bfloat16, const uint32_t* a, const uint32_t* b, float* d) {
  return launch(bfloat16 ? multiply_fragments<__nv_bfloat16> : multiply_fragments<half>, dim3(1), dim3(32), 0, nullptr,
                a, b, d);
}

const char* run_multiply_tiles(bool bfloat16, const uint4* a, const uint4* b, float* d, bool b_is_transposed) {
  return launch(bfloat16 ? multiply_tiles<__nv_bfloat16> : multiply_tiles<half>, dim3(1), dim3(32), 1024, nullptr, a, b,
                d, b_is_transposed);
}

const char* run_load_tile(uint32_t* out, int row_bytes, bool swizzled) {
  return launch(load_tile, dim3(1), dim3(32), 32 * row_bytes, nullptr, out, row_bytes, swizzled);
}

const char* run_exchange_lanes(int* values) { return launch(exchange_lanes, dim3(1), dim3(32), 0, nullptr, values); }

const char* run_write_indices(int* out) { return launch(write_indices, dim3(3, 2, 2), dim3(4, 3, 2), 0, nullptr, out); }

const char* run_write_order(int* order, int* count, int blocks) {
  return launch(write_order, dim3(blocks), dim3(1), 0, nullptr, order, count);
}

const char* run_copy_some(const uint4* in, uint4* out, int valid) {
  return launch(copy_some, dim3(1), dim3(1), 16, nullptr, in, out, valid);
}

const char* run_skip_barrier(int blocks, int threads, int shared_bytes) {
  return launch(skip_barrier, dim3(blocks), dim3(threads), shared_bytes, nullptr);
}
}

}  // namespace gistkern
