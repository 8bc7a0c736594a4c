// The operators `run_planned` and `planned_output`: a forward or a backward that Python has planned, in one call. They
// make the results and the workspace and launch the plan's kernels on them (launcher.h). Beside bindings.cpp this file
// knows torch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "launcher.h"
#include "on_device.h"
#include "tensor_checks.h"

namespace {

using gistkern::LaunchDescription;
using gistkern::LaunchTensor;
using namespace gistkern::checks;

// What Python describes (gistkern/backends/planned.py), in int64: a header, slots, and launches, each its length and
// then as launcher.h says. A launch's tensors are the slots. A slot is
//   kind, element type (torch's ScalarType), value, dims, dims sizes, dims strides (both in elements)
enum Header : int { kDevice, kWorkspaceBytes, kSlots, kLaunches, kHeader };  // device -1: CPU tensors over a stub
enum SlotKind : int {
  kGiven,   // the call's next tensor, which starts at a multiple of `value` bytes
  kFixed,   // memory at address `value`, which Python keeps
  kResult,  // a tensor that is made and handed back
  kPart,    // of the workspace, from byte `value` on
};
constexpr int64_t kMaxSlots = 64, kMaxDims = 5, kAlignment = 16;
constexpr int32_t kOnCpu = -1;

struct Slot {
  int64_t kind, value;
};

class Description {
 public:
  explicit Description(const Tensor& numbers) {
    require(
        numbers.is_cpu() && numbers.dim() == 1 && numbers.is_contiguous() && numbers.scalar_type() == ScalarType::Long,
        "a plan's description must be an int64 vector on the CPU");
    next_ = static_cast<const int64_t*>(numbers.data_ptr());
    end_ = next_ + numbers.numel();
    const int64_t* header = take(kHeader);
    device = static_cast<int32_t>(header[kDevice]);
    workspace_bytes = header[kWorkspaceBytes];
    num_slots = header[kSlots];
    num_launches = header[kLaunches];
    require(header[kDevice] >= kOnCpu && header[kDevice] <= INT16_MAX, "a plan's device is ", header[kDevice]);
    require(workspace_bytes >= 0 && workspace_bytes <= kMostElements, "a workspace of ", workspace_bytes, " bytes");
    require(num_slots >= 0 && num_slots <= kMaxSlots, "a plan has up to ", kMaxSlots, " slots, not ", num_slots);
    require(num_launches >= 0 && num_launches <= static_cast<int64_t>(gistkern::kMaxLaunches), "a plan has up to ",
            gistkern::kMaxLaunches, " launches, not ", num_launches);
  }

  Slot slot(LaunchTensor& tensor) {
    const int64_t* head = take(4);
    const int64_t type = head[1], dims = head[3];
    require(head[0] >= kGiven && head[0] <= kPart, "a slot is of no known kind (", head[0], ")");
    require(type >= 0 && type <= INT8_MAX, "a slot has the element type ", type);
    require(dims >= 0 && dims <= kMaxDims, "a slot has ", dims, " dimensions, it may have up to ", kMaxDims);
    tensor.type = static_cast<int32_t>(type);
    tensor.element_bytes = static_cast<int32_t>(aoti_torch_dtype_element_size(tensor.type));
    tensor.dims = static_cast<size_t>(dims);
    tensor.sizes = take(dims);
    tensor.strides = take(dims);
    return {head[0], head[2]};
  }

  LaunchDescription launch() {
    const int64_t length = take(1)[0];
    return {take(length), length};
  }

  void end() const { require(next_ == end_, "a plan's description is longer than what it describes"); }

  int32_t device;
  int64_t workspace_bytes, num_slots, num_launches;

 private:
  const int64_t* take(int64_t count) {
    require(count >= 0 && count <= end_ - next_, "a plan's description ends before what it describes");
    const int64_t* taken = next_;
    next_ += count;
    return taken;
  }

  const int64_t* next_;
  const int64_t* end_;
};

// Elements from the first to the last one; sizes and strides must not be negative, nor reach further than any memory.
int64_t span(const LaunchTensor& tensor) {
  int64_t last = 0;
  bool empty = false;
  for (size_t i = 0; i < tensor.dims; ++i) {
    const int64_t size = tensor.sizes[i], stride = tensor.strides[i];
    require(size >= 0 && stride >= 0 && size <= kMostElements && stride <= kMostElements, "a slot of ", size,
            " elements, ", stride, " apart");
    empty = empty || size == 0;
    require(size < 2 || stride <= (kMostElements - last) / (size - 1), "a slot is larger than any memory");
    last += size < 2 ? 0 : (size - 1) * stride;
  }
  return empty ? 0 : last + 1;
}

// Whether a tensor is what the kernels were chosen for. Not an error: the caller has other ways to serve it.
bool fits(const Tensor& tensor, LaunchTensor& expected, int64_t alignment, int32_t device) {
  if (device == kOnCpu ? !tensor.is_cpu() : !tensor.is_cuda() || tensor.get_device_index() != device) return false;
  if (static_cast<int32_t>(tensor.scalar_type()) != expected.type) return false;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  if (!std::equal(sizes.begin(), sizes.end(), expected.sizes, expected.sizes + expected.dims) ||
      !std::equal(strides.begin(), strides.end(), expected.strides, expected.strides + expected.dims)) {
    return false;
  }
  expected.data = tensor.data_ptr();
  return reinterpret_cast<uintptr_t>(expected.data) % static_cast<uint64_t>(alignment) == 0;
}

Tensor made(const LaunchTensor& like, int32_t device) {
  const int32_t kind = device == kOnCpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  AtenTensorHandle handle = nullptr;
  // past the dispatcher on the CPU: half the time of `new_empty`
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(like.dims), like.sizes, like.strides,
                                                         like.type, kind, std::max(device, 0), &handle));
  return Tensor(handle);
}

// Results in the order of their slots; none at all, and nothing launched, if a tensor is not as described.
std::vector<Tensor> run(const Tensor& numbers, const std::vector<const Tensor*>& given, size_t most_results) {
  Description description(numbers);
  const int32_t device = description.device;
  const auto num_slots = static_cast<size_t>(description.num_slots);
  std::vector<Slot> slots(num_slots);
  std::vector<LaunchTensor> tensors(num_slots);
  size_t num_given = 0, num_results = 0;
  for (size_t i = 0; i < num_slots; ++i) {
    LaunchTensor& tensor = tensors[i];
    const auto [kind, value] = slots[i] = description.slot(tensor);
    if (kind == kGiven) {
      require(value >= 1, "a tensor starts at a multiple of ", value, " bytes");
      if (num_given == given.size() || !fits(*given[num_given], tensor, value, device)) return {};
      ++num_given;
    } else if (kind == kFixed) {
      tensor.data = reinterpret_cast<const void*>(value);
    } else {
      const int64_t elements = span(tensor);
      num_results += kind == kResult;
      require(kind == kResult || (value >= 0 && value % kAlignment == 0 &&
                                  elements <= (description.workspace_bytes - value) / tensor.element_bytes),
              "a part lies outside of the workspace");
    }
  }
  if (num_given != given.size()) return {};
  LaunchDescription launches[gistkern::kMaxLaunches];
  const auto num_launches = static_cast<size_t>(description.num_launches);
  for (size_t i = 0; i < num_launches; ++i) launches[i] = description.launch();
  description.end();
  require(num_results <= most_results, "a plan of ", num_results, " results was run for ", most_results);

  const auto launch = [&](void* stream) {
    std::vector<Tensor> results;
    const int64_t bytes = description.workspace_bytes, one = 1;
    std::optional<Tensor> workspace;  // freed in the stream's order, after the launches
    if (bytes > 0) workspace = made({nullptr, static_cast<int32_t>(ScalarType::Byte), 1, &bytes, &one, 1}, device);
    const char* first = workspace ? static_cast<const char*>(workspace->data_ptr()) : nullptr;
    for (size_t i = 0; i < num_slots; ++i) {
      LaunchTensor& tensor = tensors[i];
      if (slots[i].kind == kResult) tensor.data = results.emplace_back(made(tensor, device)).data_ptr();
      if (slots[i].kind == kPart) tensor.data = first + slots[i].value;
    }
    const std::string error = launch_described(launches, num_launches, tensors.data(), num_slots, stream);
    require(error.empty(), error);
    return results;
  };
  if (device == kOnCpu) return launch(nullptr);
  const gistkern::OnGpu on(device);
  return launch(on.stream());
}

std::vector<Tensor> run_planned(const Tensor& description, const std::vector<Tensor>& tensors) {
  std::vector<const Tensor*> given;
  for (const Tensor& tensor : tensors) given.push_back(&tensor);
  return run(description, given, kMaxSlots);
}

// The one result of a forward that hands back no other, or an undefined tensor (None): without lists a microsecond
// less.
Tensor planned_output(const Tensor& description, const Tensor& q, const Tensor& k, const Tensor& v,
                      const MaybeTensor& past_k, const MaybeTensor& past_v) {
  std::vector<const Tensor*> given{&q, &k, &v};
  if (past_k) given.push_back(&*past_k);
  if (past_v) given.push_back(&*past_v);
  std::vector<Tensor> results = run(description, given, 1);
  return results.empty() ? Tensor() : std::move(results[0]);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gistkern_native, m) {
  m.def("run_planned(Tensor description, Tensor[] tensors) -> Tensor[]");
  m.def("planned_output(Tensor description, Tensor q, Tensor k, Tensor v, Tensor? past_k, Tensor? past_v) -> Tensor");
}

// Not for sparse, quantized and meta tensors, which lie otherwise.
STABLE_TORCH_LIBRARY_IMPL(gistkern_native, CPU, m) {
  m.impl("run_planned", TORCH_BOX(&run_planned));
  m.impl("planned_output", TORCH_BOX(&planned_output));
}
STABLE_TORCH_LIBRARY_IMPL(gistkern_native, CUDA, m) {
  m.impl("run_planned", TORCH_BOX(&run_planned));
  m.impl("planned_output", TORCH_BOX(&planned_output));
}
