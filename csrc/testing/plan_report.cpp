// plan_report decode|compact [NAME=NUMBER ...]: what the launchers would launch, as JSON, for bench/compiled/cuda.py.
//
// The launchers of decode.cu and compact.cu run as they are, on addresses that nobody reads: emulator::run records a
// launch instead of running it. So nothing about a launch is stated twice.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include "../compact.cu"
#include "../decode.cu"

namespace gistkern {
namespace emulator {

struct Launch {
  std::string symbol, function;
  unsigned threads;
  size_t shared_bytes;
};

std::vector<Launch> launches;

const char* run(dim3 /*grid*/, dim3 block, size_t shared_bytes, void (*)(const void*), const void* call, bool) {
  Dl_info found;
  // launch() hands over its Call, whose first member is the kernel
  if (dladdr(*static_cast<void* const*>(call), &found) == 0 || found.dli_sname == nullptr) return "a nameless kernel";
  char* readable = abi::__cxa_demangle(found.dli_sname, nullptr, nullptr, nullptr);
  launches.push_back({found.dli_sname, readable, block.x * block.y * block.z, shared_bytes});
  std::free(readable);
  return nullptr;
}

// The kernels need these names; no kernel runs.
const Indices* running = nullptr;
void fail(const char*, ...) { std::abort(); }
bool sync_threads(bool) { std::abort(); }
void sync_warp(uint32_t) { std::abort(); }
uint32_t shuffle(Meeting, uint32_t, uint32_t, uint32_t) { std::abort(); }
uint32_t ballot(uint32_t, bool) { std::abort(); }
void load_matrix(Meeting, uint32_t (&)[4], const void*) { std::abort(); }
void mma(Meeting, float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) { std::abort(); }
void* shared_memory() { std::abort(); }
void copy_async(void*, const void*, int) { std::abort(); }
void copy_async_commit() { std::abort(); }
void copy_async_wait(int) { std::abort(); }
void await_earlier_launches() { std::abort(); }
void touch(const char*, int64_t) { std::abort(); }
uint32_t arrive(uint32_t*, uint32_t) { std::abort(); }

}  // namespace emulator

const char* describe_stream(void*, unsigned long long& id, bool& captured) { return id = 0, captured = false, nullptr; }

namespace {

alignas(16) char buffer[16];  // stands for every tensor
using Numbers = std::map<std::string, int>;

struct Tile {
  int rows, packed_rows, columns, stages;  // 0 where there are none
};

Rows rows_of(ElementType type, int head_dim, int rows, int heads) {
  Rows result;
  result.data = buffer;
  if (is_quantized(type)) result.scale = reinterpret_cast<const float*>(buffer);
  int64_t row = head_dim, head = row * rows;
  for (int i = 0; i < 3; ++i) result.stride[i] = i == 0 ? head * heads : i == 1 ? head : row;
  result.type = type;
  return result;
}

const char* decode(Numbers& numbers, Tile& tile) {
  DecodeArguments a;
  a.query = a.out = buffer;
  a.lse = reinterpret_cast<float*>(buffer);
  a.gist_begin = a.gist_end = reinterpret_cast<const int32_t*>(buffer);
  a.batch = 1, a.query_heads = numbers["query_heads"], a.kv_heads = numbers["kv_heads"];
  a.query_rows = 1, a.head_dim = numbers["head_dim"], a.multiprocessors = numbers["multiprocessors"];
  a.gist_capacity = numbers["gist_rows"], a.tail_capacity = numbers["tail_rows"];
  a.query_stride[0] = a.head_dim * a.query_heads, a.query_stride[1] = a.query_stride[2] = a.head_dim;
  ElementType gist_type = numbers["quantized"] ? ElementType::kInt8 : a.type;
  a.gist_key = a.gist_value = rows_of(gist_type, a.head_dim, a.gist_capacity, a.kv_heads);
  a.tail_key = a.tail_value = rows_of(a.type, a.head_dim, a.tail_capacity, a.kv_heads);
  auto variant = static_cast<DecodeVariant>(numbers["variant"]);
  DecodePlan plan = plan_decode(a, variant);
  bool tensor_core = plan.variant == DecodeVariant::kTensorCore;
  tile.rows = plan.unit_rows, tile.packed_rows = packed_rows(a), tile.stages = tensor_core ? kMmaStages : 0;
  tile.columns =
      tensor_core ? mma_columns(plan.width) : 32 / plan.lanes * simt_columns(element_bytes(a.type), plan.quantized);
  const DecodeScratch scratch{[](void*, int64_t) { return reinterpret_cast<float*>(buffer); }, nullptr};
  return gistkern_decode(&a, variant, &scratch, nullptr);
}

const char* compact(Numbers& numbers, Tile& tile) {
  CompactArguments a;
  a.batch = 1, a.kv_heads = numbers["kv_heads"], a.head_dim = numbers["head_dim"];
  a.gathered_rows = numbers["gist_rows"];
  a.gather = reinterpret_cast<const int64_t*>(buffer);
  a.key = a.value = rows_of(a.out_type, a.head_dim, numbers["tail_rows"], a.kv_heads);
  a.out_key = a.out_value = buffer;
  Rows out = rows_of(a.out_type, a.head_dim, a.gathered_rows, a.kv_heads);
  std::copy(out.stride, out.stride + 3, a.out_stride);
  tile = {kCompactThreads / plan_compact(a).lanes, 0, 0, 0};
  return gistkern_compact(&a, nullptr);
}

int report(const std::string& call, Numbers numbers) {
  Tile tile{};
  const char* error = call == "decode" ? decode(numbers, tile) : compact(numbers, tile);
  if (error != nullptr) {
    std::fprintf(stderr, "%s\n", error);
    return 1;
  }
  std::printf("{\"rows\": %d, \"packed_rows\": %d, \"columns\": %d, \"stages\": %d, \"launches\": [", tile.rows,
              tile.packed_rows, tile.columns, tile.stages);
  const char* separator = "";
  for (const emulator::Launch& launch : emulator::launches) {
    std::printf("%s{\"symbol\": \"%s\", \"function\": \"%s\", \"threads\": %u, \"shared_bytes\": %zu}", separator,
                launch.symbol.c_str(), launch.function.c_str(), launch.threads, launch.shared_bytes);
    separator = ", ";
  }
  std::printf("]}\n");
  return 0;
}

}  // namespace

const char* allocate_zeros(size_t, void** memory) { return *memory = buffer, nullptr; }

}  // namespace gistkern

int main(int argc, char** argv) {
  gistkern::Numbers numbers;
  for (int i = 2; i < argc; ++i) {
    std::string text = argv[i];
    size_t equals = text.find('=');
    if (equals == std::string::npos) return std::fprintf(stderr, "NAME=NUMBER, not %s\n", argv[i]), 2;
    numbers[text.substr(0, equals)] = std::atoi(text.c_str() + equals + 1);
  }
  return argc < 2 ? 2 : gistkern::report(argv[1], numbers);
}
