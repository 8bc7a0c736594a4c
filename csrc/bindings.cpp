// The file that knows torch (planned.cpp is the other), through libtorch's stable ABI: the same library loads under CPU
// and CUDA builds of torch >= 2.10. It checks tensors (tensor_checks.h, and cpu/bounds.h for values on the CPU), turns
// them into the argument structs of the kernels and allocates results. No call of these operators reaches outside a
// buffer.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/bounds.h"
#include "cpu/launch.h"
#include "gistkern/compact.h"
#include "gistkern/decode.h"
#include "launcher_binding.h"
#include "on_device.h"
#include "tensor_checks.h"

namespace {

using gistkern::CompactArguments;
using gistkern::DecodeArguments;
using gistkern::DecodeVariant;
using gistkern::ElementType;
using gistkern::Rows;
using namespace gistkern::checks;

ElementType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::Half:
      return ElementType::kFloat16;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Char:
      return ElementType::kInt8;
    case ScalarType::Float8_e4m3fn:
      return ElementType::kFloat8E4M3;
    default:
      require(false, "the kernels have no such element type");
      return ElementType::kFloat32;
  }
}

// Which dimensions of a tensor are (sample, head, row): a pool [rows, heads, D] has no samples.
struct Axes {
  int sample, head, row;
};
constexpr Axes kSampleHeadRow = {0, 1, 2}, kSampleRowHead = {0, 2, 1}, kPool = {-1, 1, 0};

Rows rows_of(const Tensor& tensor, Axes axes, const MaybeTensor& scale = std::nullopt) {
  const auto stride = [&](const Tensor& t, int axis) { return axis < 0 ? int64_t{0} : t.stride(axis); };
  Rows rows;
  rows.data = tensor.data_ptr();
  rows.type = element_type(tensor);
  rows.stride[0] = stride(tensor, axes.sample);
  rows.stride[1] = stride(tensor, axes.head);
  rows.stride[2] = stride(tensor, axes.row);
  if (scale) {
    rows.scale = static_cast<const float*>(scale->data_ptr());
    rows.scale_stride[0] = stride(*scale, axes.sample);
    rows.scale_stride[1] = stride(*scale, axes.head);
    rows.scale_stride[2] = stride(*scale, axes.row);
  }
  return rows;
}

template <typename T>
const T* data_of(const MaybeTensor& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

template <typename T>
const T* data_of(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

void check(const char* error) {
  if (error) require(false, error);
}

gistkern::cpu::Pool torch_pool() {
  return {[](int64_t threads, void (*body)(void*), void* context) {
            torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context);
            });
          },
          torch::stable::get_num_threads()};
}

gistkern::cpu::AttentionArguments attention_arguments(const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor& gist_k, const Tensor& gist_v,
                                                      const Tensor& gist_begin, const Tensor& gist_end,
                                                      const Tensor& local_begin, double scale, const Tensor& out,
                                                      const Tensor& lse) {
  gistkern::cpu::AttentionArguments arguments;
  arguments.query = rows_of(q, kSampleHeadRow);
  arguments.key = rows_of(k, kSampleHeadRow);
  arguments.value = rows_of(v, kSampleHeadRow);
  arguments.gist_key = rows_of(gist_k, kSampleHeadRow);
  arguments.gist_value = rows_of(gist_v, kSampleHeadRow);
  arguments.gist_begin = data_of<int32_t>(gist_begin);
  arguments.gist_end = data_of<int32_t>(gist_end);
  arguments.local_begin = data_of<int32_t>(local_begin);
  arguments.out = out.data_ptr();
  arguments.lse = static_cast<float*>(lse.data_ptr());
  arguments.batch = q.size(0);
  arguments.query_heads = q.size(1);
  arguments.kv_heads = k.size(1);
  arguments.rows = q.size(2);
  arguments.local_rows = k.size(2);
  arguments.gist_rows = gist_k.size(2);
  arguments.head_dim = q.size(3);
  arguments.scale = to_scale(scale);
  check(gistkern::cpu::leaves_buffers(arguments));
  return arguments;
}

std::tuple<Tensor, Tensor> cpu_attention(Tensor q, Tensor k, Tensor v, Tensor gist_k, Tensor gist_v, Tensor gist_begin,
                                         Tensor gist_end, Tensor local_begin, double scale) {
  check_attention(q, k, v, gist_k, gist_v, gist_begin, gist_end, local_begin);
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  check(gistkern::cpu::attention_forward(
      attention_arguments(q, k, v, gist_k, gist_v, gist_begin, gist_end, local_begin, scale, out, lse), torch_pool()));
  return {out, lse};
}

// With `gather` the gradients of the compact rows gathered from k and v are added to those of k and v, and the last two
// results are those of the past rows in front of them.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                                          Tensor gist_k, Tensor gist_v, Tensor out,
                                                                          Tensor lse, Tensor gist_begin,
                                                                          Tensor gist_end, Tensor local_begin,
                                                                          double scale, MaybeTensor gather) {
  check_attention(q, k, v, gist_k, gist_v, gist_begin, gist_end, local_begin);
  require_rows_of("grad_out", grad_out, {q.size(0), q.size(1), q.size(2), q.size(3)}, q);
  require_vector("out", out, q.scalar_type(), {q.size(0), q.size(1), q.size(2), q.size(3)}, q);
  require_vector("lse", lse, ScalarType::Float, {q.size(0), q.size(1), q.size(2)}, q);
  auto arguments = attention_arguments(q, k, v, gist_k, gist_v, gist_begin, gist_end, local_begin, scale, out, lse);
  arguments.past_rows = arguments.gist_rows;
  if (gather) {
    require_gather(*gather, q.size(0), q);
    require(gather->size(1) <= arguments.gist_rows, "gather lists ", gather->size(1), " rows a sample, but there are ",
            arguments.gist_rows, " compact rows");
    arguments.past_rows -= gather->size(1);
    arguments.gather = data_of<int64_t>(*gather);
    for (int axis = 0; axis < 2; ++axis) arguments.gather_stride[axis] = gather->stride(axis);
    check(gistkern::cpu::gather_leaves_rows(arguments));
  }
  Tensor gradients[5];
  const Tensor* like[] = {&q, &k, &v};
  for (int i = 0; i < 3; ++i) gradients[i] = torch::stable::new_empty(*like[i], like[i]->sizes());
  for (int i = 3; i < 5; ++i) {
    gradients[i] = torch::stable::new_empty(q, {q.size(0), k.size(1), arguments.past_rows, q.size(3)});
  }
  arguments.grad_out = rows_of(grad_out, kSampleHeadRow);
  arguments.grad_query = gradients[0].data_ptr();
  arguments.grad_key = gradients[1].data_ptr();
  arguments.grad_value = gradients[2].data_ptr();
  arguments.grad_gist_key = gradients[3].data_ptr();
  arguments.grad_gist_value = gradients[4].data_ptr();
  check(gistkern::cpu::attention_backward(arguments, torch_pool()));
  return {gradients[0], gradients[1], gradients[2], gradients[3], gradients[4]};
}

// gist_k, gist_v: [B, Hkv, G, D], or a pool [R, Hkv, D]. tail_k, tail_v: [B, Hkv, M, D], or with a page table pages
// [P, page_size, Hkv, D]. Scales have the shape of their buffer without D.
std::tuple<Tensor, Tensor> decode(Tensor q, Tensor gist_k, Tensor gist_v, MaybeTensor gist_k_scale,
                                  MaybeTensor gist_v_scale, Tensor gist_begin, Tensor gist_end, Tensor tail_k,
                                  Tensor tail_v, MaybeTensor tail_k_scale, MaybeTensor tail_v_scale,
                                  MaybeTensor tail_length, MaybeTensor local_begin, MaybeTensor page_table,
                                  int64_t gist_capacity, int64_t tail_capacity, double scale, int64_t variant,
                                  int64_t multiprocessors) {
  require_dims("q", q, 4);
  require(gist_k.dim() == 3 || gist_k.dim() == 4, "gist_k must be a pool [rows, heads, D] or [batch, heads, rows, D]");
  require_dims("tail_k", tail_k, 4);
  const Axes gist_axes = gist_k.dim() == 3 ? kPool : kSampleHeadRow;
  const Axes tail_axes = page_table ? kSampleRowHead : kSampleHeadRow;
  DecodeArguments arguments;
  const int64_t batch = arguments.batch = to_int32("batch", q.size(0), 1);
  const int64_t heads = arguments.query_heads = to_int32("heads", q.size(1), 1);
  const int64_t rows = arguments.query_rows = to_int32("the number of query rows", q.size(2), 1);
  const int64_t dim = arguments.head_dim = to_int32("head_dim", q.size(3), 1);
  const int64_t kv_heads = arguments.kv_heads = to_int32("key/value heads", gist_k.size(gist_axes.head), 1);
  const int64_t gist_rows = to_int32("the number of gist rows", gist_k.size(gist_axes.row));
  const int64_t tail_rows = to_int32("the number of tail rows", tail_k.size(tail_axes.row));
  require(rows <= 8, "decoding takes up to 8 query rows a sequence, got ", rows);
  require(heads % kv_heads == 0, "query heads (", heads, ") must be a multiple of key/value heads (", kv_heads, ")");
  require_float("q", q);
  require_rows_of("q", q, {batch, heads, rows, dim}, q);
  to_int32("batch * heads * rows", batch * heads * rows);
  int64_t tail_room = tail_rows, pages = 0;
  if (page_table) {
    require_dims("page_table", *page_table, 2);
    arguments.pages_per_sequence = to_int32("the number of pages", page_table->size(1));
    arguments.page_size = to_int32("page_size", tail_rows, 1);
    require_vector("page_table", *page_table, ScalarType::Int, {batch, page_table->size(1)}, q);
    pages = tail_k.size(0);
    tail_room = page_table->size(1) * tail_rows;
  }
  const auto check_buffer = [&](const char* name, const Tensor& tensor, const MaybeTensor& scales, bool gist) {
    if (gist && gist_axes.sample < 0) {
      require_rows(name, tensor, {gist_rows, kv_heads, dim}, q);
    } else if (gist || !page_table) {
      require_rows(name, tensor, {batch, kv_heads, gist ? gist_rows : tail_rows, dim}, q);
    } else {
      require_rows(name, tensor, {pages, tail_rows, kv_heads, dim}, q);
    }
    if (!is_quantized(tensor)) require_type(name, tensor, q.scalar_type());
    require_scale((std::string(name) + "_scale").c_str(), scales, tensor);
  };
  check_buffer("gist_k", gist_k, gist_k_scale, true);
  check_buffer("gist_v", gist_v, gist_v_scale, true);
  check_buffer("tail_k", tail_k, tail_k_scale, false);
  check_buffer("tail_v", tail_v, tail_v_scale, false);
  require_vector("gist_begin", gist_begin, ScalarType::Int, {batch, rows}, q);
  require_vector("gist_end", gist_end, ScalarType::Int, {batch, rows}, q);
  if (local_begin) require_vector("local_begin", *local_begin, ScalarType::Int, {batch, rows}, q);
  if (tail_length) require_vector("tail_length", *tail_length, ScalarType::Int, {batch}, q);
  arguments.gist_capacity = to_int32("gist_capacity", gist_capacity);
  arguments.tail_capacity = to_int32("tail_capacity", tail_capacity);
  require(tail_capacity <= tail_room, "tail_capacity is ", tail_capacity, ", the tail has room for ", tail_room);
  require(0 <= variant && variant <= 2, "variant must be 0, 1 or 2, got ", variant);
  arguments.multiprocessors = to_int32("multiprocessors", multiprocessors, 1);
  arguments.scale = to_scale(scale);

  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {batch, heads, rows}, ScalarType::Float);
  arguments.query = q.data_ptr();
  for (int axis = 0; axis < 3; ++axis) arguments.query_stride[axis] = q.stride(axis);
  arguments.out = out.data_ptr();
  arguments.lse = static_cast<float*>(lse.data_ptr());
  arguments.type = element_type(q);
  arguments.gist_key = rows_of(gist_k, gist_axes, gist_k_scale);
  arguments.gist_value = rows_of(gist_v, gist_axes, gist_v_scale);
  arguments.tail_key = rows_of(tail_k, tail_axes, tail_k_scale);
  arguments.tail_value = rows_of(tail_v, tail_axes, tail_v_scale);
  arguments.gist_begin = data_of<int32_t>(gist_begin);
  arguments.gist_end = data_of<int32_t>(gist_end);
  arguments.local_begin = data_of<int32_t>(local_begin);
  arguments.interval_stride[0] = rows;
  arguments.interval_stride[1] = 1;
  arguments.tail_length = data_of<int32_t>(tail_length);
  arguments.page_table = data_of<int32_t>(page_table);
  if (q.is_cpu()) check(gistkern::cpu::leaves_buffers(arguments, {gist_rows, pages, gist_axes.sample >= 0}));
#if defined(GISTKERN_WITH_CUDA)
  if (gistkern::runs_on_gpu(q)) {
    const gistkern::OnDevice device(q);
    std::pair<const Tensor&, MaybeTensor> memory{q, std::nullopt};  // freed in the stream's order, after the launch
    const auto workspace = [](void* context, int64_t floats) {
      auto& [like, allocated] = *static_cast<decltype(memory)*>(context);
      allocated = torch::stable::new_empty(like, {floats}, ScalarType::Float);
      return static_cast<float*>(allocated->data_ptr());
    };
    const gistkern::DecodeScratch scratch{workspace, &memory};
    check(gistkern_decode(&arguments, static_cast<DecodeVariant>(variant), &scratch, device.stream()));
    return {out, lse};
  }
#endif
  require_cpu(q);
  check(gistkern::cpu::decode(arguments, torch_pool()));
  return {out, lse};
}

// out_k, out_v: [B, Hkv, past + gathered, D], or with `slot` a pool [R, Hkv, D]; scales without D.
void compact(Tensor k, Tensor v, MaybeTensor past_k, MaybeTensor past_v, Tensor gather, MaybeTensor slot, Tensor out_k,
             Tensor out_v, MaybeTensor out_k_scale, MaybeTensor out_v_scale) {
  require_dims("k", k, 4);
  require_dims("gather", gather, 2);
  CompactArguments arguments;
  const int64_t batch = arguments.batch = to_int32("batch", k.size(0));
  const int64_t kv_heads = arguments.kv_heads = to_int32("key/value heads", k.size(1), 1);
  const int64_t dim = arguments.head_dim = to_int32("head_dim", k.size(3), 1);
  require_float("k", k);
  require_rows_of("k", k, {batch, kv_heads, k.size(2), dim}, k);
  require_rows_of("v", v, {batch, kv_heads, k.size(2), dim}, k);
  require(past_k.has_value() == past_v.has_value(), "past_k and past_v go together");
  if (past_k) {
    require_dims("past_k", *past_k, 4);
    arguments.past_rows = to_int32("the number of past rows", past_k->size(2));
    require_rows_of("past_k", *past_k, {batch, kv_heads, past_k->size(2), dim}, k);
    require_rows_of("past_v", *past_v, {batch, kv_heads, past_k->size(2), dim}, k);
    arguments.past_key = rows_of(*past_k, kSampleHeadRow);
    arguments.past_value = rows_of(*past_v, kSampleHeadRow);
  }
  arguments.gathered_rows = to_int32("the number of gathered rows", gather.size(1));
  const int64_t columns = to_int32("the number of compact rows", int64_t{arguments.past_rows} + gather.size(1));
  require_gather(gather, batch, k);
  if (slot) require_vector("slot", *slot, ScalarType::Long, {batch, columns}, k);
  const auto check_out = [&](const char* name, const Tensor& out, const MaybeTensor& scale) {
    require_dims(name, out, slot ? 3 : 4);
    if (slot) {
      require_rows(name, out, {out.size(0), kv_heads, dim}, k);
    } else {
      require_rows(name, out, {batch, kv_heads, columns, dim}, k);
    }
    if (!is_quantized(out)) require_type(name, out, k.scalar_type());
    require_scale((std::string(name) + "_scale").c_str(), scale, out);
    require_no_overlap(name, out);
    if (scale) require_no_overlap("a scale", *scale);
  };
  check_out("out_k", out_k, out_k_scale);
  check_out("out_v", out_v, out_v_scale);
  require_type("out_v", out_v, out_k.scalar_type());
  const auto alike = [](const Tensor& a, const Tensor& b) {
    const auto sizes = a.sizes(), others = b.sizes(), strides = a.strides(), other_strides = b.strides();
    return std::equal(sizes.begin(), sizes.end(), others.begin(), others.end()) &&
           std::equal(strides.begin(), strides.end(), other_strides.begin(), other_strides.end()) &&
           (a.numel() == 0 || a.data_ptr() != b.data_ptr());
  };
  require(alike(out_k, out_v) && (!out_k_scale || alike(*out_k_scale, *out_v_scale)),
          "keys and values must lie alike in memory, and not in the same place");
  arguments.key = rows_of(k, kSampleHeadRow);
  arguments.value = rows_of(v, kSampleHeadRow);
  arguments.gather = data_of<int64_t>(gather);
  arguments.gather_stride[0] = gather.stride(0);
  arguments.gather_stride[1] = gather.stride(1);
  arguments.slot = data_of<int64_t>(slot);
  const Rows out = rows_of(out_k, slot ? kPool : kSampleHeadRow, out_k_scale);
  arguments.out_key = out_k.data_ptr();
  arguments.out_value = out_v.data_ptr();
  arguments.out_key_scale = const_cast<float*>(data_of<float>(out_k_scale));
  arguments.out_value_scale = const_cast<float*>(data_of<float>(out_v_scale));
  for (int axis = 0; axis < 3; ++axis) {
    arguments.out_stride[axis] = out.stride[axis];
    arguments.out_scale_stride[axis] = out.scale_stride[axis];
  }
  arguments.out_type = out.type;
  if (k.is_cpu()) check(gistkern::cpu::leaves_buffers(arguments, k.size(2), out_k.size(0)));
#if defined(GISTKERN_WITH_CUDA)
  if (gistkern::runs_on_gpu(k)) {
    const gistkern::OnDevice device(k);
    check(gistkern_compact(&arguments, device.stream()));
    return;
  }
#endif
  require_cpu(k);
  check(gistkern::cpu::compact(arguments, torch_pool()));
}

// Counts changes of these operators; INTERFACE of gistkern/backends/native.py must agree.
int64_t interface() { return 4; }

std::string instruction_set() {
  const char* error = nullptr;
  const char* name = gistkern::cpu::instruction_set(&error);
  check(error);
  return name;
}

// Architectures of the CUDA kernels, as GISTKERN_CUDA_ARCHS named them; empty in a build without CUDA.
std::string cuda_archs() {
#if defined(GISTKERN_WITH_CUDA)
  return GISTKERN_WITH_CUDA;
#else
  return "";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(gistkern_native, m) {
  m.def(
      "cpu_attention(Tensor q, Tensor k, Tensor v, Tensor gist_k, Tensor gist_v, Tensor gist_begin, Tensor gist_end, "
      "Tensor local_begin, float scale) -> (Tensor, Tensor)");
  m.def(
      "cpu_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor gist_k, Tensor gist_v, Tensor out, "
      "Tensor lse, Tensor gist_begin, Tensor gist_end, Tensor local_begin, float scale, Tensor? gather=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "decode(Tensor q, Tensor gist_k, Tensor gist_v, Tensor? gist_k_scale, Tensor? gist_v_scale, Tensor gist_begin, "
      "Tensor gist_end, Tensor tail_k, Tensor tail_v, Tensor? tail_k_scale, Tensor? tail_v_scale, Tensor? tail_length, "
      "Tensor? local_begin, Tensor? page_table, int gist_capacity, int tail_capacity, float scale, int variant, "
      "int multiprocessors) -> (Tensor, Tensor)");
  m.def(
      "compact(Tensor k, Tensor v, Tensor? past_k, Tensor? past_v, Tensor gather, Tensor? slot, Tensor(a!) out_k, "
      "Tensor(b!) out_v, Tensor(c!)? out_k_scale, Tensor(d!)? out_v_scale) -> ()");
  m.def("launch(Tensor description, Tensor(a!)[] tensors, bool emulated) -> ()");
  m.def("interface() -> int");
  m.def("instruction_set() -> str");
  m.def("cuda_archs() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(gistkern_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_attention", TORCH_BOX(&cpu_attention));
  m.impl("cpu_attention_backward", TORCH_BOX(&cpu_attention_backward));
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("compact", TORCH_BOX(&compact));
  m.impl("launch", TORCH_BOX(&gistkern::launch));
  m.impl("interface", TORCH_BOX(&interface));
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("cuda_archs", TORCH_BOX(&cuda_archs));
}
