#include "launcher.h"

#include <cstring>
#include <mutex>
#include <sstream>
#include <utility>
#include <vector>

#include "dynamic_loading.h"

namespace gistkern {
namespace {

// Of NVIDIA's cuda.h, which a build without CUDA does not have: the driver's binary interface does not change.
struct alignas(64) TensorMap {
  uint64_t words[16];
};
struct LaunchAttribute {
  uint32_t id;
  alignas(8) uint32_t value[16];
};
struct LaunchConfig {
  uint32_t grid[3], block[3], shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  uint32_t num_attributes;
};
static_assert(sizeof(TensorMap) == 128 && sizeof(LaunchAttribute) == 72 && sizeof(LaunchConfig) == 56);
enum : uint32_t { kCooperative = 2, kClusterDimension = 4, kClusterScheduling = 5, kStreamSerialization = 6 };
constexpr uint32_t kSpreadClusters = 1;
constexpr int kNoInterleave = 0, kPromote128 = 2;

constexpr int kMaxRank = 5, kMaxBox = 256, kMapAlignment = 16, kMaxCluster = 8, kMaxParameters = 256;
constexpr int64_t kMaxGrid[3] = {INT32_MAX, 65535, 65535}, kMaxWarps = 32, kMaxShared = 1 << 20;
constexpr int64_t kMaxSize = int64_t{1} << 32, kMaxStrideBytes = int64_t{1} << 40;
constexpr int64_t kMaxMapType = 12, kMaxSwizzle = 6;

struct Driver {
  int (*launch)(const LaunchConfig*, void*, void**, void**) = nullptr;
  int (*encode)(TensorMap*, int, uint32_t, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*,
                int, int, int, int) = nullptr;
  int (*error_name)(int, const char**) = nullptr;
  int version = 0;
};

// A kernel's handle comes from a driver that this process has loaded: that one is asked, none is loaded here.
Driver driver() {
  static std::mutex mutex;
  static Driver found;
  std::lock_guard<std::mutex> lock(mutex);
  if (found.launch != nullptr) return found;
  void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return found;
  const auto look_up = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
  };
  int (*get_version)(int*) = nullptr;
  look_up(get_version, "cuDriverGetVersion");
  if (get_version != nullptr) get_version(&found.version);
  look_up(found.encode, "cuTensorMapEncodeTiled");
  look_up(found.error_name, "cuGetErrorName");
  look_up(found.launch, "cuLaunchKernelEx");
  return found;
}

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

std::string failure(const Driver& driver, const char* call, int code) {
  const char* name = nullptr;
  if (driver.error_name == nullptr || driver.error_name(code, &name) != 0) name = nullptr;
  return text(call, " failed: ", name ? name : "an error without a name", " (", code, ")");
}

// The numbers of a description, read one after the other. Past its end they are zeros, and `ended` says so.
struct Reader {
  const int64_t* next;
  const int64_t* end;
  bool ended = false;

  int64_t number() {
    if (next < end) return *next++;
    ended = true;
    return 0;
  }
};

struct Map {
  const LaunchTensor* tensor = nullptr;
  int type = 0, swizzle = 0, fill = 0;
  uint32_t rank = 0, box[kMaxRank], element_strides[kMaxRank];  // the innermost dimension first, as the driver has it
  uint64_t sizes[kMaxRank], strides[kMaxRank];                  // strides in bytes, from the second dimension on
};

// Elements from the first to the last one, both included.
int64_t span(const int64_t* sizes, const int64_t* strides, size_t dims) {
  int64_t last = 0;
  for (size_t i = 0; i < dims; ++i) {
    if (sizes[i] == 0) return 0;
    last += (sizes[i] - 1) * strides[i];
  }
  return last + 1;
}

std::string read_map(Reader& reader, const LaunchTensor& tensor, Map& map) {
  map.tensor = &tensor;
  const int64_t type = reader.number(), swizzle = reader.number(), fill = reader.number(), rank = reader.number();
  if (reader.ended) return "is not described to its end";
  if (type < 0 || type > kMaxMapType) return text("has the element type ", type, ", there are 0 to ", kMaxMapType);
  if (swizzle < 0 || swizzle > kMaxSwizzle) return text("has the swizzle ", swizzle, ", there are 0 to ", kMaxSwizzle);
  if (fill < 0 || fill > 1) return text("has the fill ", fill, ", there are 0 and 1");
  if (rank < 1 || rank > kMaxRank) return text("has ", rank, " dimensions, it may have 1 to ", kMaxRank);
  int64_t sizes[kMaxRank], strides[kMaxRank], boxes[kMaxRank];
  for (int64_t* numbers : {sizes, strides, boxes}) {
    for (int i = 0; i < rank; ++i) numbers[i] = reader.number();
  }
  if (reader.ended) return "is not described to its end";
  map.type = static_cast<int>(type), map.swizzle = static_cast<int>(swizzle), map.fill = static_cast<int>(fill);
  map.rank = static_cast<uint32_t>(rank);
  for (int i = 0; i < rank; ++i) {
    const int at = static_cast<int>(rank) - 1 - i;  // the driver's number of this dimension
    const int64_t box = boxes[i];
    if (box < 1 || box > kMaxBox) return text("has a box of ", box, " elements, it may have 1 to ", kMaxBox);
    if (sizes[i] < 1 || sizes[i] > kMaxSize) return text("has a dimension of ", sizes[i], " elements");
    if (at == 0 && strides[i] != 1) return text("has the stride ", strides[i], " in its last dimension, not 1");
    if (at == 0 && box * tensor.element_bytes % kMapAlignment != 0) {
      return text("has rows of ", box * tensor.element_bytes, " bytes in its box, not a multiple of ", kMapAlignment);
    }
    const bool fits = strides[i] >= 0 && strides[i] < kMaxStrideBytes / tensor.element_bytes;
    const int64_t bytes = fits ? strides[i] * tensor.element_bytes : 0;
    if (!fits || (at > 0 && bytes % kMapAlignment != 0)) {
      return text("has a stride of ", strides[i], " elements, which must be a multiple of ", kMapAlignment, " bytes");
    }
    map.sizes[at] = static_cast<uint64_t>(sizes[i]);
    if (at > 0) map.strides[at - 1] = static_cast<uint64_t>(bytes);
    map.box[at] = static_cast<uint32_t>(box);
    map.element_strides[at] = 1;
  }
  const int64_t reached = span(sizes, strides, static_cast<size_t>(rank));
  if (reached > span(tensor.sizes, tensor.strides, tensor.dims)) {
    return "reaches past the end of its tensor";
  }
  if (reinterpret_cast<uintptr_t>(tensor.data) % kMapAlignment != 0) {
    return text("must start at a multiple of ", kMapAlignment, " bytes");
  }
  return "";
}

// Drivers up to 13.1 mishandle one bit of the maps of small tensors; CUTLASS and Triton 3.7 clear it, and so does this.
void mend_small(TensorMap& encoded, const Map& map, int driver_version) {
  if (driver_version > 13010) return;
  uint64_t last_byte = (map.sizes[0] - 1) * map.tensor->element_bytes;
  for (uint32_t i = 1; i < map.rank; ++i) last_byte += (map.sizes[i] - 1) * map.strides[i - 1];
  if (last_byte + 1 < 128 * 1024) encoded.words[1] &= ~(uint64_t{1} << 21);
}

std::string launch_it(const Driver& driver, const int64_t* header, void** parameters, void* stream) {
  using namespace description;
  LaunchAttribute attributes[4];
  std::memset(attributes, 0, sizeof(attributes));
  LaunchConfig config{};
  config.attributes = attributes;
  const auto add = [&](uint32_t id, uint32_t value) -> LaunchAttribute& {
    LaunchAttribute& attribute = attributes[config.num_attributes++];
    attribute.id = id;
    attribute.value[0] = value;
    return attribute;
  };
  const auto cluster = static_cast<uint32_t>(header[kCluster]);
  for (int i = 0; i < 3; ++i) config.grid[i] = static_cast<uint32_t>(header[kGrid + i]);
  config.grid[0] *= cluster;
  config.block[0] = static_cast<uint32_t>(header[kWarps] * 32);
  config.block[1] = config.block[2] = 1;
  config.shared_bytes = static_cast<uint32_t>(header[kSharedBytes]);
  config.stream = stream;
  if (header[kDependent]) add(kStreamSerialization, 1);
  if (header[description::kCooperative]) add(gistkern::kCooperative, 1);
  if (cluster > 1) {
    LaunchAttribute& dimension = add(kClusterDimension, cluster);
    dimension.value[1] = dimension.value[2] = 1;
    add(kClusterScheduling, kSpreadClusters);
  }
  const int code = driver.launch(&config, reinterpret_cast<void*>(header[kFunction]), parameters, nullptr);
  return code == 0 ? "" : failure(driver, "cuLaunchKernelEx", code);
}

std::string check_header(const int64_t* header, size_t tensors) {
  using namespace description;
  if (header[kFunction] == 0) return "the kernel has no handle";
  for (int i = 0; i < 3; ++i) {
    const int64_t blocks = header[kGrid + i] * (i == 0 ? header[kCluster] : 1);
    if (header[kGrid + i] < 1 || header[kGrid + i] > kMaxGrid[i] || blocks > kMaxGrid[i]) {
      return text("the grid has ", header[kGrid + i], " in dimension ", i, ", it may have 1 to ", kMaxGrid[i]);
    }
  }
  if (header[kWarps] < 1 || header[kWarps] > kMaxWarps) return text("a block cannot have ", header[kWarps], " warps");
  if (header[kSharedBytes] < 0 || header[kSharedBytes] > kMaxShared) {
    return text("a block cannot have ", header[kSharedBytes], " bytes of shared memory");
  }
  if (header[kTensors] != static_cast<int64_t>(tensors)) {
    return text("the kernel takes ", header[kTensors], " tensors, got ", tensors);
  }
  if (header[kParameters] < 0 || header[kParameters] > kMaxParameters) {
    return text("a kernel cannot have ", header[kParameters], " parameters");
  }
  return "";
}

// A launch with its parameters packed. One of a call's many: nothing is cleared that is not read.
struct Packed {
  const int64_t* header;
  uint64_t words[kMaxParameters];
  void* parameters[kMaxParameters + 1];
  std::vector<std::pair<size_t, Map>> maps;  // which parameter, and what of
  std::vector<TensorMap> encoded;
};

std::string pack(const LaunchDescription& described, const LaunchTensor* tensors, size_t num_tensors, Packed& packed) {
  using namespace description;
  const int64_t* header = packed.header = described.numbers;
  if (described.length < kHeader) return "the description ends in its header";
  if (header[kCluster] < 1 || header[kCluster] > kMaxCluster) {
    return text("a cluster has 1 to ", kMaxCluster, " blocks, not ", header[kCluster]);
  }
  if (std::string error = check_header(header, num_tensors); !error.empty()) return error;
  const auto count = static_cast<size_t>(header[kParameters]);
  Reader reader{header + kHeader, header + described.length};
  packed.parameters[count] = nullptr;
  for (size_t i = 0; i < count; ++i) {
    packed.parameters[i] = &packed.words[i];
    const int64_t kind = reader.number();
    if (kind == kNumber) {
      packed.words[i] = static_cast<uint64_t>(reader.number());
      continue;
    }
    const int64_t index = reader.number(), type = reader.number();
    if (reader.ended) break;
    if (kind != kPointer && kind != kMap) return text("parameter ", i, " is of no known kind (", kind, ")");
    if (index < 0 || index >= static_cast<int64_t>(num_tensors)) {
      return text("parameter ", i, " is tensor ", index, " of ", num_tensors);
    }
    const LaunchTensor& tensor = tensors[index];
    if (tensor.type != type) return text("tensor ", index, " has the element type ", tensor.type, ", not ", type);
    if (kind == kMap) {
      std::string error = read_map(reader, tensor, packed.maps.emplace_back(i, Map{}).second);
      if (!error.empty()) return text("the tensor map of tensor ", index, " ", error);
      continue;
    }
    const int64_t alignment = reader.number();
    if (reader.ended) break;
    packed.words[i] = reinterpret_cast<uint64_t>(tensor.data);
    if (alignment < 1 || packed.words[i] % static_cast<uint64_t>(alignment) != 0) {
      return text("tensor ", index, " must start at a multiple of ", alignment, " bytes");
    }
  }
  if (reader.ended || reader.next != reader.end) return "the description is not as long as its parameters";
  return "";
}

std::string encode(const Driver& driver, Packed& packed) {
  if (packed.maps.empty()) return "";
  if (driver.encode == nullptr) return "this CUDA driver is too old for tensor maps";
  packed.encoded.resize(packed.maps.size());
  for (size_t i = 0; i < packed.maps.size(); ++i) {
    const auto& [parameter, map] = packed.maps[i];
    const int code =
        driver.encode(&packed.encoded[i], map.type, map.rank, const_cast<void*>(map.tensor->data), map.sizes,
                      map.strides, map.box, map.element_strides, kNoInterleave, map.swizzle, kPromote128, map.fill);
    if (code != 0) return failure(driver, "cuTensorMapEncodeTiled", code);
    mend_small(packed.encoded[i], map, driver.version);
    packed.parameters[parameter] = &packed.encoded[i];
  }
  return "";
}

}  // namespace

std::string launch_described(const LaunchDescription* launches, size_t count, const LaunchTensor* tensors,
                             size_t num_tensors, void* stream) {
  if (count > kMaxLaunches) return text("a call has up to ", kMaxLaunches, " launches, not ", count);
  Packed packed[kMaxLaunches];
  for (size_t i = 0; i < count; ++i) {
    if (std::string error = pack(launches[i], tensors, num_tensors, packed[i]); !error.empty()) return error;
  }
  const Driver found = driver();
  if (found.launch == nullptr) return "no CUDA driver is loaded: a kernel's handle comes from one";
  for (size_t i = 0; i < count; ++i) {
    if (std::string error = encode(found, packed[i]); !error.empty()) return error;
  }
  for (size_t i = 0; i < count; ++i) {
    std::string error = launch_it(found, packed[i].header, packed[i].parameters, stream);
    if (!error.empty()) return error;
  }
  return "";
}

}  // namespace gistkern
