// The one file that knows torch, through libtorch's stable ABI: the same library loads under CPU and CUDA builds of
// torch >= 2.11. It turns tensors into the argument structs of the kernels and allocates results; gistkern/native.py
// validates before it calls.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <optional>
#include <string>
#include <tuple>

#include "cpu/launch.h"
#include "gistkern/compact.h"
#include "gistkern/decode.h"

namespace {

using gistkern::CompactArguments;
using gistkern::DecodeArguments;
using gistkern::DecodeVariant;
using gistkern::ElementType;
using gistkern::Rows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

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
      STD_TORCH_CHECK(false, "gistkern's kernels have no such element type");
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

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, "gistkern: ", error); }

gistkern::cpu::Pool torch_pool() {
  return {[](int64_t threads, void (*body)(void*), void* context) {
            torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(context);
            });
          },
          torch::stable::get_num_threads()};
}

#if defined(GISTKERN_WITH_CUDA) && !defined(GISTKERN_EMULATED)
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
void* current_stream(int32_t device) { return torch::stable::accelerator::getCurrentStream(device).nativeHandle(); }
#else
// Before 2.13 only the library of torch's CUDA operators tells the stream. It is loaded already where a tensor is on a
// GPU; linking against it would keep this library from loading beside a CPU build of torch.
void* current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void**);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get != nullptr && get(device, &stream) == 0, "gistkern: torch does not tell its current CUDA stream");
  return stream;
}
#endif

// The device of a tensor made current, and its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor)
      : guard_(tensor.get_device_index()), stream_(current_stream(tensor.get_device_index())) {}
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
};
bool runs_on_gpu(const Tensor& tensor) { return tensor.is_cuda(); }
#elif defined(GISTKERN_EMULATED)
// The emulator runs the CUDA kernels on CPU tensors.
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  void* stream() const { return nullptr; }
};
bool runs_on_gpu(const Tensor&) { return true; }
#endif

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
  arguments.scale = static_cast<float>(scale);
  return arguments;
}

std::tuple<Tensor, Tensor> cpu_attention(Tensor q, Tensor k, Tensor v, Tensor gist_k, Tensor gist_v, Tensor gist_begin,
                                         Tensor gist_end, Tensor local_begin, double scale) {
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  check(gistkern::cpu::attention_forward(
      attention_arguments(q, k, v, gist_k, gist_v, gist_begin, gist_end, local_begin, scale, out, lse), torch_pool()));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cpu_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v,
                                                                          Tensor gist_k, Tensor gist_v, Tensor out,
                                                                          Tensor lse, Tensor gist_begin,
                                                                          Tensor gist_end, Tensor local_begin,
                                                                          double scale) {
  auto arguments = attention_arguments(q, k, v, gist_k, gist_v, gist_begin, gist_end, local_begin, scale, out, lse);
  Tensor gradients[5];
  const Tensor* like[] = {&q, &k, &v, &gist_k, &gist_v};
  for (int i = 0; i < 5; ++i) gradients[i] = torch::stable::new_empty(*like[i], like[i]->sizes());
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
                                  int64_t gist_capacity, int64_t tail_capacity, double scale,
                                  [[maybe_unused]] int64_t variant, int64_t multiprocessors) {
  const Axes gist_axes = gist_k.dim() == 3 ? kPool : kSampleHeadRow;
  const Axes tail_axes = page_table ? kSampleRowHead : kSampleHeadRow;
  Tensor out = torch::stable::new_empty(q, q.sizes());
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  DecodeArguments arguments;
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
  arguments.interval_stride[0] = gist_begin.stride(0);
  arguments.interval_stride[1] = gist_begin.stride(1);
  arguments.tail_length = data_of<int32_t>(tail_length);
  if (page_table) {
    arguments.page_table = data_of<int32_t>(page_table);
    arguments.pages_per_sequence = static_cast<int32_t>(page_table->size(1));
    arguments.page_size = static_cast<int32_t>(tail_k.size(1));
  }
  arguments.batch = static_cast<int32_t>(q.size(0));
  arguments.query_heads = static_cast<int32_t>(q.size(1));
  arguments.kv_heads = static_cast<int32_t>(gist_k.size(1));
  arguments.query_rows = static_cast<int32_t>(q.size(2));
  arguments.head_dim = static_cast<int32_t>(q.size(3));
  arguments.gist_capacity = static_cast<int32_t>(gist_capacity);
  arguments.tail_capacity = static_cast<int32_t>(tail_capacity);
  arguments.multiprocessors = static_cast<int32_t>(multiprocessors);
  arguments.scale = static_cast<float>(scale);
#if defined(GISTKERN_WITH_CUDA)
  if (runs_on_gpu(q)) {
    const auto chosen = static_cast<DecodeVariant>(variant);
    const OnDevice device(q);
    check(gistkern_decode_refuses(&arguments, chosen));
    const int64_t floats = gistkern_decode_workspace_floats(&arguments, chosen);
    Tensor workspace = torch::stable::new_empty(q, {floats}, ScalarType::Float);
    arguments.workspace = floats ? static_cast<float*>(workspace.data_ptr()) : nullptr;
    check(gistkern_decode(&arguments, chosen, device.stream()));
    return {out, lse};
  }
#endif
  check(gistkern::cpu::decode(arguments, torch_pool()));
  return {out, lse};
}

// out_k, out_v: [B, Hkv, past + gathered, D], or with `slot` a pool [R, Hkv, D]; scales without D.
void compact(Tensor k, Tensor v, MaybeTensor past_k, MaybeTensor past_v, Tensor gather, MaybeTensor slot, Tensor out_k,
             Tensor out_v, MaybeTensor out_k_scale, MaybeTensor out_v_scale) {
  CompactArguments arguments;
  arguments.key = rows_of(k, kSampleHeadRow);
  arguments.value = rows_of(v, kSampleHeadRow);
  if (past_k) {
    arguments.past_key = rows_of(*past_k, kSampleHeadRow);
    arguments.past_value = rows_of(*past_v, kSampleHeadRow);
    arguments.past_rows = static_cast<int32_t>(past_k->size(2));
  }
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
  arguments.batch = static_cast<int32_t>(k.size(0));
  arguments.kv_heads = static_cast<int32_t>(k.size(1));
  arguments.head_dim = static_cast<int32_t>(k.size(3));
  arguments.gathered_rows = static_cast<int32_t>(gather.size(1));
#if defined(GISTKERN_WITH_CUDA)
  if (runs_on_gpu(k)) {
    const OnDevice device(k);
    check(gistkern_compact(&arguments, device.stream()));
    return;
  }
#endif
  check(gistkern::cpu::compact(arguments, torch_pool()));
}

// Counts changes of these operators; INTERFACE of gistkern/native.py must agree.
int64_t interface() { return 1; }

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
      "Tensor lse, Tensor gist_begin, Tensor gist_end, Tensor local_begin, float scale) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "decode(Tensor q, Tensor gist_k, Tensor gist_v, Tensor? gist_k_scale, Tensor? gist_v_scale, Tensor gist_begin, "
      "Tensor gist_end, Tensor tail_k, Tensor tail_v, Tensor? tail_k_scale, Tensor? tail_v_scale, Tensor? tail_length, "
      "Tensor? local_begin, Tensor? page_table, int gist_capacity, int tail_capacity, float scale, int variant, "
      "int multiprocessors) -> (Tensor, Tensor)");
  m.def(
      "compact(Tensor k, Tensor v, Tensor? past_k, Tensor? past_v, Tensor gather, Tensor? slot, Tensor(a!) out_k, "
      "Tensor(b!) out_v, Tensor(c!)? out_k_scale, Tensor(d!)? out_v_scale) -> ()");
  m.def("interface() -> int");
  m.def("instruction_set() -> str");
  m.def("cuda_archs() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(gistkern_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_attention", TORCH_BOX(&cpu_attention));
  m.impl("cpu_attention_backward", TORCH_BOX(&cpu_attention_backward));
  m.impl("decode", TORCH_BOX(&decode));
  m.impl("compact", TORCH_BOX(&compact));
  m.impl("interface", TORCH_BOX(&interface));
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("cuda_archs", TORCH_BOX(&cuda_archs));
}
