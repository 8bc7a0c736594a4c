// Launcher of compaction: validate, plan, launch.
#include "gistkern/compact.cuh"
#include "gistkern/compact.h"
#include "gistkern/plan.h"

namespace gistkern {
namespace {

const char* invalid_source(const Rows& rows, ElementType out_type) {
  if (rows.data == nullptr) return "a key or value buffer is missing";
  if (is_quantized(rows.type) && rows.scale == nullptr) return "a quantized buffer needs scales";
  bool quantizes = is_quantized(out_type) && !is_quantized(rows.type);
  return rows.type == out_type || quantizes ? nullptr : "rows are copied in their own type, or quantized";
}

const char* invalid(const CompactArguments& a) {
  if (a.batch < 0 || a.past_rows < 0 || a.gathered_rows < 0) return "sizes must not be negative";
  if (a.kv_heads < 1 || a.head_dim < 1) return "kv_heads and head_dim must be positive";
  if (is_quantized(a.out_type) && a.head_dim > kMaxQuantizedDim) return "quantized rows have a head_dim of at most 256";
  if (a.out_key == nullptr || a.out_value == nullptr) return "an output buffer is missing";
  if (is_quantized(a.out_type) && (a.out_key_scale == nullptr || a.out_value_scale == nullptr)) {
    return "a quantized output needs scales";
  }
  if (a.gathered_rows > 0) {
    if (a.gather == nullptr) return "the gather list is missing";
    if (const char* error = invalid_source(a.key, a.out_type)) return error;
    if (const char* error = invalid_source(a.value, a.out_type)) return error;
  }
  if (a.past_rows > 0) {
    if (const char* error = invalid_source(a.past_key, a.out_type)) return error;
    if (const char* error = invalid_source(a.past_value, a.out_type)) return error;
  }
  return nullptr;
}

CompactSide side_of(const CompactArguments& a, const Rows& local, const Rows& past, void* out, float* out_scale) {
  bool one_sample = a.batch == 1, one_head = a.kv_heads == 1;
  bool whole = a.head_dim % kCompactElements == 0;  // what one lane quantizes
  auto aligned = [&](const Rows& rows) {
    return whole && rows_aligned(rows.data, rows.stride, element_bytes(rows.type), one_sample, one_head);
  };
  CompactSide side;
  side.local = local;
  side.past = past;
  side.out = static_cast<char*>(out);
  side.out_scale = out_scale;
  side.local_aligned = aligned(local);
  side.past_aligned = aligned(past);
  side.out_aligned = whole && rows_aligned(out, a.out_stride, element_bytes(a.out_type), one_sample, one_head);
  return side;
}

CompactPlan plan_compact(const CompactArguments& a) {
  CompactPlan plan;
  plan.sides[0] = side_of(a, a.key, a.past_key, a.out_key, a.out_key_scale);
  plan.sides[1] = side_of(a, a.value, a.past_value, a.out_value, a.out_value_scale);
  plan.element_bytes = element_bytes(a.out_type);
  plan.quantized = is_quantized(a.out_type);
  int elements = plan.quantized ? kCompactElements : 16 / plan.element_bytes;
  while (plan.lanes < 32 && plan.lanes * elements < a.head_dim) plan.lanes *= 2;
  plan.row_blocks = static_cast<int>(divide_up(a.past_rows + a.gathered_rows, kCompactThreads / plan.lanes));
  return plan;
}

}  // namespace

extern "C" const char* gistkern_compact(const CompactArguments* arguments, void* stream) {
  const CompactArguments& a = *arguments;
  if (a.batch == 0 || a.past_rows + a.gathered_rows == 0) return nullptr;
  if (const char* error = invalid(a)) return error;
  CompactPlan plan = plan_compact(a);
  int64_t blocks = int64_t{2} * a.batch * a.kv_heads * plan.row_blocks;
  if (blocks > INT32_MAX) return "too many rows for one launch";
  return launch(gist_compact_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kCompactThreads), 0, stream, a, plan);
}

}  // namespace gistkern
