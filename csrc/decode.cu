// Launcher of decoding: validate, plan, choose the kernel, launch.
#include "gistkern/arrivals.h"
#include "gistkern/decode.h"
#include "gistkern/decode_mma.cuh"
#include "gistkern/decode_simt.cuh"
#include "gistkern/plan.h"

namespace gistkern {
namespace {

using DecodeKernel = void (*)(DecodeArguments, DecodePlan);

const char* invalid_buffer(const Rows& rows, ElementType type) {
  if (rows.data == nullptr) return "a key or value buffer is missing";
  if (rows.type != type && !is_quantized(rows.type)) return "keys and values have the query's type, or are quantized";
  if (is_quantized(rows.type) && rows.scale == nullptr) return "a quantized buffer needs scales";
  return nullptr;
}

const char* invalid(const DecodeArguments& a) {
  if (a.type != ElementType::kFloat32 && a.type != ElementType::kFloat16 && a.type != ElementType::kBFloat16) {
    return "queries are fp32, fp16 or bf16";
  }
  if (a.head_dim < 1 || a.head_dim > kMaxHeadDim) return "head_dim must lie in 1..256";
  if (a.query_rows < 1 || a.query_rows > kMaxQueryRows) return "query_rows must lie in 1..8";
  if (a.batch < 0 || a.gist_capacity < 0 || a.tail_capacity < 0) return "sizes must not be negative";
  if (a.kv_heads < 1 || a.query_heads < 1 || a.query_heads % a.kv_heads != 0) {
    return "query_heads must be a multiple of kv_heads";
  }
  if (!(a.scale > 0.0f)) return "scale must be positive";
  if (a.page_table != nullptr && a.page_size < 1) return "page_size must be positive";
  if (uses_gists(a)) {
    if (a.gist_begin == nullptr || a.gist_end == nullptr) return "gist intervals are missing";
    if (const char* error = invalid_buffer(a.gist_key, a.type)) return error;
    if (const char* error = invalid_buffer(a.gist_value, a.type)) return error;
  }
  if (uses_tail(a)) {
    if (const char* error = invalid_buffer(a.tail_key, a.type)) return error;
    if (const char* error = invalid_buffer(a.tail_value, a.type)) return error;
  }
  return nullptr;
}

template <typename T, bool kQuantized>
DecodeKernel simt_kernel(int rows) {
  return rows == 1 ? gist_decode_simt_kernel<T, 1, kQuantized> : gist_decode_simt_kernel<T, kSimtRows, kQuantized>;
}

template <typename T, bool kQuantized>
DecodeKernel mma_kernel(int width) {
  if (width == 64) return gist_decode_mma_kernel<T, 64, kQuantized>;
  if (width == 128) return gist_decode_mma_kernel<T, 128, kQuantized>;
  return gist_decode_mma_kernel<T, 256, kQuantized>;
}

template <typename T>
DecodeKernel kernel_of(const DecodePlan& plan) {
  if constexpr (sizeof(T) == 2) {
    if (plan.variant == DecodeVariant::kTensorCore) {
      return plan.quantized ? mma_kernel<T, true>(plan.width) : mma_kernel<T, false>(plan.width);
    }
  }
  return plan.quantized ? simt_kernel<T, true>(plan.unit_rows) : simt_kernel<T, false>(plan.unit_rows);
}

template <typename T>
const char* launch_decode(const DecodeArguments& a, const DecodePlan& plan, void* stream) {
  dim3 grid(plan.splits * plan.blocks), block(plan.warps * 32);
  return launch_early(kernel_of<T>(plan), grid, block, plan.shared_bytes, stream, a, plan);
}

// Memory for the splits.
const char* plan_splits(DecodePlan& plan, const DecodeArguments& a, const DecodeScratch* scratch, void* stream) {
  static Arrivals& arrivals = *new Arrivals;  // launches may outlive what is destroyed at exit
  if (scratch == nullptr || scratch->workspace == nullptr) return "this decode launch is split and needs a workspace";
  int64_t rows = static_cast<int64_t>(a.batch) * a.query_heads * a.query_rows;
  plan.workspace = scratch->workspace(scratch->context, plan.splits * rows * (a.head_dim + 1));
  if (plan.workspace == nullptr) return "there is no workspace for a split decode launch";
  plan.stores_aligned = plan.stores_aligned && reinterpret_cast<int64_t>(plan.workspace) % 16 == 0;
  return arrivals.of_launch(stream, plan.units, &plan.arrivals);
}

}  // namespace

extern "C" const char* gistkern_decode_refuses(const DecodeArguments* arguments, DecodeVariant variant) {
  if (const char* error = invalid(*arguments)) return error;
  return variant == DecodeVariant::kTensorCore ? tensor_core_refuses(*arguments) : nullptr;
}

extern "C" const char* gistkern_decode(const DecodeArguments* arguments, DecodeVariant variant,
                                       const DecodeScratch* scratch, void* stream) {
  if (const char* error = gistkern_decode_refuses(arguments, variant)) return error;
  const DecodeArguments& a = *arguments;
  if (a.batch == 0) return nullptr;
  DecodePlan plan = plan_decode(a, variant);
  if (plan.splits > 1) {
    if (const char* error = plan_splits(plan, a, scratch, stream)) return error;
  }
  if (a.type == ElementType::kFloat32) return launch_decode<float>(a, plan, stream);
  if (a.type == ElementType::kFloat16) return launch_decode<half>(a, plan, stream);
  return launch_decode<__nv_bfloat16>(a, plan, stream);
}

}  // namespace gistkern
