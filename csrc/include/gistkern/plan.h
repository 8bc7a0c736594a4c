// How a decode launch is cut up: host arithmetic on sizes, so nothing waits for the device. The shapes of tiles are the
// kernels' too.
#pragma once

#include <algorithm>
#include <utility>

#include "gistkern/decode.h"
#include "gistkern/port.cuh"

namespace gistkern {

// Rows of a tensor-core tile, and packed rows that the SIMT kernel keeps in registers: one, or so many.
constexpr int kMmaRows = 16;
constexpr int kSimtRows = 4;
constexpr int kSimtWarps = 4;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxQueryRows = 8;

// Below so many columns a split costs more in merging than it saves, and a split should not be shorter.
constexpr int kUnsplitColumns = 512;
constexpr int kSplitColumns = 256;
// The units of a launch that is split: more would fill two of the largest devices twice.
constexpr int kMaxSplitUnits = 512;

// Blocks that a multiprocessor's registers should hold at least: as many as do without spills.
__host__ __device__ constexpr int simt_blocks(int rows, bool quantized) {
  return (rows == 1 ? 4 : 3) - (quantized ? 1 : 0);
}

// Tensor-core tiles: width elements a row (head_dim padded), so many columns a tile. Four warps of two K and two V
// tiles take 64 KiB. Two such blocks fit in a multiprocessor's registers, and in its shared memory where that has 164
// or 228 KiB; where it has 100, one. At width 256 outputs take 128 registers, so the query stays in shared memory, and
// two warps a block keep it at 80 KiB.
__host__ __device__ constexpr int mma_width(int head_dim) { return head_dim <= 64 ? 64 : head_dim <= 128 ? 128 : 256; }
__host__ __device__ constexpr int mma_warps(int width) { return width <= 128 ? 4 : 2; }
__host__ __device__ constexpr int mma_columns(int width) { return width <= 64 ? 32 : 16; }
__host__ __device__ constexpr int mma_tile_bytes(int width) { return mma_columns(width) * width * 2; }
constexpr int kMmaStages = 2;
__host__ __device__ constexpr bool mma_keeps_query(int width) { return width > 128; }
__host__ __device__ constexpr int mma_warp_bytes(int width) {
  return 2 * kMmaStages * mma_tile_bytes(width) + (mma_keeps_query(width) ? kMmaRows * width * 2 : 0);
}

// Elements of a row that one SIMT lane holds: 128 bits of the narrowest type in use (fp32: two loads).
__host__ __device__ constexpr int simt_elements(bool quantized) { return quantized ? 16 : 8; }
// Columns whose K and V pieces one SIMT lane loads at once: 32 registers of them.
__host__ __device__ constexpr int simt_columns(int type_bytes, bool quantized) {
  int row_bytes = simt_elements(quantized) * type_bytes;
  return row_bytes > 64 ? 1 : 64 / row_bytes;
}

// A warp's partial result in shared memory: rows of width + padding floats, which spreads the rows of an mma result
// over the banks, then a maximum and a sum per row.
constexpr int kPartialPadding = 8;
__host__ __device__ constexpr int partial_floats(int rows, int width) {
  return rows * (width + kPartialPadding) + (2 * rows + 3) / 4 * 4;
}

// Of keys, of values or of their scales. A paged tail has no sample stride, an unpaged one no page stride.
struct ByteStrides {
  int64_t gist[3] = {0, 0, 0}, tail[3] = {0, 0, 0};
  int64_t page = 0;
};

struct DecodePlan {
  DecodeVariant variant = DecodeVariant::kSimt;
  bool quantized = false;
  int width = 0;           // elements of a tile's row, or of a row over its SIMT lanes
  int lanes = 0;           // per column, SIMT
  int unit_rows = 0;       // packed rows (query rows times heads of one K/V head) that a unit holds at most
  int packs = 0;           // units per (sequence, K/V head)
  int units = 0;           // over all sequences and K/V heads
  int splits = 1;          // of each unit's columns
  int warps = 0;           // per block
  int warps_per_unit = 0;  // all warps of a block, or 1: then a block holds `warps` units
  int blocks = 0;          // per split
  int shared_bytes = 0;
  float* workspace =
      nullptr;  // of the splits: [splits, rows of all, head_dim] outputs, then [splits, rows of all] LSEs
  uint32_t* arrivals = nullptr;  // [units], zero before the launch and after it: how many splits of a unit are done
  int64_t query_stride[3] = {0, 0, 0};  // in bytes
  ByteStrides keys, values, key_scales, value_scales;
  // 128-bit loads are possible: of the query, and of each buffer
  bool query_aligned = false, gist_key_aligned = false, gist_value_aligned = false;
  bool tail_key_aligned = false, tail_value_aligned = false;
  bool stores_aligned = false;  // four elements of out and workspace at a time
};

inline bool is_quantized(ElementType type) { return type == ElementType::kInt8 || type == ElementType::kFloat8E4M3; }

// Whether every row starts at a multiple of 16 bytes. A stride along an extent of one is never used.
inline bool rows_aligned(const void* data, const int64_t (&stride)[3], int bytes, bool one_sample, bool one_head) {
  int64_t odd = reinterpret_cast<int64_t>(data) | (stride[2] * bytes);
  if (!one_sample) odd |= stride[0] * bytes;
  if (!one_head) odd |= stride[1] * bytes;
  return odd % 16 == 0;
}

inline bool uses_gists(const DecodeArguments& arguments) { return arguments.gist_capacity > 0; }
inline bool uses_tail(const DecodeArguments& arguments) { return arguments.tail_capacity > 0; }

inline bool any_quantized(const DecodeArguments& arguments) {
  const DecodeArguments& a = arguments;
  return (uses_gists(a) && (is_quantized(a.gist_key.type) || is_quantized(a.gist_value.type))) ||
         (uses_tail(a) && (is_quantized(a.tail_key.type) || is_quantized(a.tail_value.type)));
}

inline int packed_rows(const DecodeArguments& arguments) {
  return arguments.query_rows * (arguments.query_heads / arguments.kv_heads);
}

// Fills in which loads may have 128 bits; `elements` of a row are loaded together.
inline void plan_alignment(DecodePlan& plan, const DecodeArguments& arguments, int elements) {
  const DecodeArguments& a = arguments;
  bool whole = a.head_dim % elements == 0, one_head = a.kv_heads == 1;
  auto aligned = [&](const Rows& rows, bool one_sample) {
    return whole && rows_aligned(rows.data, rows.stride, element_bytes(rows.type), one_sample, one_head);
  };
  bool one_sample = a.batch == 1, one_page = one_sample && a.page_table == nullptr;
  plan.query_aligned =
      whole && rows_aligned(a.query, a.query_stride, element_bytes(a.type), one_sample, a.query_heads == 1);
  plan.gist_key_aligned = !uses_gists(a) || aligned(a.gist_key, one_sample);
  plan.gist_value_aligned = !uses_gists(a) || aligned(a.gist_value, one_sample);
  plan.tail_key_aligned = !uses_tail(a) || aligned(a.tail_key, one_page);
  plan.tail_value_aligned = !uses_tail(a) || aligned(a.tail_value, one_page);
  plan.stores_aligned = a.head_dim % 4 == 0 && reinterpret_cast<int64_t>(a.out) % 16 == 0;
}

inline ByteStrides byte_strides(const int64_t (&gist)[3], int gist_bytes, const int64_t (&tail)[3], int tail_bytes,
                                bool paged) {
  ByteStrides strides;
  for (int i = 0; i < 3; ++i) {
    strides.gist[i] = gist[i] * gist_bytes;
    strides.tail[i] = tail[i] * tail_bytes;
  }
  if (paged) std::swap(strides.page, strides.tail[0]);
  return strides;
}

inline void plan_strides(DecodePlan& plan, const DecodeArguments& arguments) {
  const DecodeArguments& a = arguments;
  bool paged = a.page_table != nullptr;
  for (int i = 0; i < 3; ++i) plan.query_stride[i] = a.query_stride[i] * element_bytes(a.type);
  auto rows = [&](const Rows& gist, const Rows& tail) {
    return byte_strides(gist.stride, element_bytes(gist.type), tail.stride, element_bytes(tail.type), paged);
  };
  auto scales = [&](const Rows& gist, const Rows& tail) {
    return byte_strides(gist.scale_stride, sizeof(float), tail.scale_stride, sizeof(float), paged);
  };
  plan.keys = rows(a.gist_key, a.tail_key);
  plan.values = rows(a.gist_value, a.tail_value);
  plan.key_scales = scales(a.gist_key, a.tail_key);
  plan.value_scales = scales(a.gist_value, a.tail_value);
}

inline const char* tensor_core_refuses(const DecodeArguments& arguments) {
  if (arguments.type == ElementType::kFloat32) return "tensor-core decoding takes fp16 or bf16 queries, not fp32";
  bool quantized = any_quantized(arguments);
  if (arguments.head_dim % 8 != 0) return "tensor-core decoding needs a head_dim that is a multiple of 8";
  if (quantized && arguments.head_dim % 16 != 0) {
    return "tensor-core decoding of quantized rows needs a head_dim that is a multiple of 16";
  }
  DecodePlan plan;
  plan_alignment(plan, arguments, quantized ? 16 : 8);
  if (!plan.query_aligned) return "tensor-core decoding needs query rows that start at multiples of 16 bytes";
  if (!plan.gist_key_aligned || !plan.gist_value_aligned || !plan.tail_key_aligned || !plan.tail_value_aligned) {
    return "tensor-core decoding needs key and value rows that start at multiples of 16 bytes";
  }
  return nullptr;
}

// Tensor cores from two packed rows on. In the sm_80 code for bf16 and head_dim 128 a column (K and V, 512 bytes) costs
// a warp about 24 instructions by tensor core, for up to 16 rows; by SIMT 67 for one row and 119 for up to four
// (docs/internals/compiled.md). Where memory delivers 15 bytes per clock and multiprocessor a column arrives every 34
// clocks, which are 136 issue slots: all of them keep up, but the code for four rows fills most of the slots and halves
// the warps that fit. One row alone leaves SIMT room, needs no shared memory, and would leave 15 of 16 rows of a
// tensor-core tile empty.
constexpr int kTensorCoreRows = 2;

inline DecodeVariant choose_variant(const DecodeArguments& arguments) {
  bool tensor_core = packed_rows(arguments) >= kTensorCoreRows && tensor_core_refuses(arguments) == nullptr;
  return tensor_core ? DecodeVariant::kTensorCore : DecodeVariant::kSimt;
}

inline int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

inline DecodePlan plan_decode(const DecodeArguments& arguments, DecodeVariant variant) {
  const DecodeArguments& a = arguments;
  DecodePlan plan;
  plan.variant = variant == DecodeVariant::kAutomatic ? choose_variant(a) : variant;
  plan.quantized = any_quantized(a);
  bool tensor_core = plan.variant == DecodeVariant::kTensorCore;
  int tile_columns;
  if (tensor_core) {
    plan.width = mma_width(a.head_dim);
    plan.unit_rows = kMmaRows;
    plan.warps = mma_warps(plan.width);
    plan.shared_bytes = plan.warps * mma_warp_bytes(plan.width);
    tile_columns = mma_columns(plan.width);
  } else {
    int elements = simt_elements(plan.quantized);
    plan.width = elements;
    while (plan.width < a.head_dim) plan.width *= 2;
    plan.lanes = plan.width / elements;
    plan.unit_rows = packed_rows(a) == 1 ? 1 : kSimtRows;
    plan.warps = kSimtWarps;
    plan.shared_bytes = plan.warps * partial_floats(plan.unit_rows, plan.width) * 4;
    tile_columns = 32 / plan.lanes * simt_columns(element_bytes(a.type), plan.quantized);
  }
  plan_alignment(plan, a, tensor_core ? 8 : simt_elements(plan.quantized));
  plan_strides(plan, a);
  plan.packs = static_cast<int>(divide_up(packed_rows(a), plan.unit_rows));
  plan.units = a.batch * a.kv_heads * plan.packs;

  // Few columns: a warp per unit, where more would have nothing to do or where the units alone fill the device.
  int64_t columns = static_cast<int64_t>(a.gist_capacity) + a.tail_capacity;
  // Such a unit is not split: the splits of a unit meet in blocks that are theirs alone.
  bool few = columns <= tile_columns || (columns <= tile_columns * plan.warps && plan.units >= a.multiprocessors);
  plan.warps_per_unit = few ? 1 : plan.warps;
  plan.blocks = static_cast<int>(divide_up(plan.units, plan.warps / plan.warps_per_unit));
  if (!few && columns > kUnsplitColumns && plan.units > 0 && plan.units <= kMaxSplitUnits) {
    int64_t wanted = divide_up(int64_t{2} * a.multiprocessors, plan.units);
    plan.splits = static_cast<int>(std::max<int64_t>(1, std::min(wanted, divide_up(columns, kSplitColumns))));
  }
  return plan;
}

}  // namespace gistkern
