// A driver without a device: the functions of libcuda.so.1 that Triton's launch path and csrc/launcher.cpp call. It
// counts launches and keeps what the last one was given; no kernel runs. stub/__init__.py says how it is used.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int Result;
enum { kSuccess = 0, kNoMemory = 2 };

// cuda.h's CUlaunchAttribute and CUlaunchConfig
typedef struct {
  uint32_t id, padding;
  char value[64];
} Attribute;

typedef struct {
  uint32_t grid[3], block[3], shared_bytes;
  void* stream;
  Attribute* attributes;
  uint32_t num_attributes;
} Config;

enum { kMaxAttributes = 8, kMaxParameters = 256, kMaxBytes = 32768, kMaxNames = 4096, kMaxName = 256 };

// Read by stub/__init__.py, which declares the same.
typedef struct {
  int64_t launches;
  int32_t num_parameters, fail;  // of sizes; the code that the next launch and the next tensor map are refused with
  int32_t sizes[kMaxParameters];
  Config config;
  Attribute attributes[kMaxAttributes];
  void *function, *recorded;  // whose parameters are kept
  char parameters[kMaxBytes];
} Record;

Record stub_record;
static char names[kMaxNames][kMaxName];
static int num_names;

// A function's handle is where its name stands. Kernels of one name are several functions: each loading is one.
Result cuModuleGetFunction(void** function, void* module, const char* name) {
  if (num_names == kMaxNames) return kNoMemory;
  strncpy(names[num_names], name, kMaxName - 1);
  *function = names[num_names++];
  return kSuccess;
}

static Result take_failure(void) {
  Result code = stub_record.fail;
  stub_record.fail = kSuccess;
  return code;
}

Result cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
  Record* r = &stub_record;
  if (r->fail != kSuccess) return take_failure();
  r->launches += 1;
  r->function = function;
  r->config = *config;
  for (uint32_t i = 0; i < config->num_attributes && i < kMaxAttributes; ++i) r->attributes[i] = config->attributes[i];
  char* to = r->parameters;
  if (function != r->recorded) return kSuccess;
  for (int i = 0; i < r->num_parameters; to += r->sizes[i++]) memcpy(to, parameters[i], r->sizes[i]);
  return kSuccess;
}

// The map holds the arguments it was encoded from, so that equal maps are equal calls.
Result cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* data, const uint64_t* dims,
                              const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                              int interleave, int swizzle, int promotion, int fill) {
  if (stub_record.fail != kSuccess) return take_failure();
  struct {
    uint64_t data, ones, dims[5], strides[4];
    uint32_t box[5];
    uint8_t element_strides[5], type, rank, interleave, swizzle, promotion, fill, padding;
  } said = {.data = (uint64_t)data,
            .ones = ~0ull,  // a launcher may clear bits of this word
            .type = type,
            .rank = rank,
            .interleave = interleave,
            .swizzle = swizzle,
            .promotion = promotion,
            .fill = fill};
  for (uint32_t i = 0; i < rank; ++i) {
    said.dims[i] = dims[i], said.box[i] = box[i], said.element_strides[i] = element_strides[i];
    if (i + 1 < rank) said.strides[i] = strides[i];
  }
  _Static_assert(sizeof(said) <= 128, "a tensor map has 128 bytes");
  memset(map, 0, 128);
  memcpy(map, &said, sizeof(said));
  return kSuccess;
}

// Of an H100: 132 multiprocessors, 227 KiB of shared memory a block, compute capability 9.0.
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 10:  // warp size
      return *value = 32, kSuccess;
    case 16:  // multiprocessors
      return *value = 132, kSuccess;
    case 75:
      return *value = 9, kSuccess;
    case 76:
      return *value = 0, kSuccess;
    case 97:  // shared memory a block may have
      return *value = 232448, kSuccess;
    default:  // registers a block, shared memory of a multiprocessor, clocks
      return *value = 65536, kSuccess;
  }
}

Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : 0;  // threads a block may have
  return kSuccess;
}

Result cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
  memcpy(value, &pointer, sizeof(pointer));
  return kSuccess;
}

static Result name_of(int code, const char** name) {
  *name = code == 0 ? "CUDA_SUCCESS" : code == 1 ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_OF_THE_STUB";
  return kSuccess;
}
Result cuGetErrorName(int code, const char** name) { return name_of(code, name); }
Result cuGetErrorString(int code, const char** text) { return name_of(code, text); }
Result cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }

static Result some_handle(void** handle) {
  *handle = &stub_record;
  return kSuccess;
}
Result cuInit(unsigned flags) { return kSuccess; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, kSuccess; }
Result cuDeviceGetCount(int* count) { return *count = 1, kSuccess; }
Result cuCtxGetCurrent(void** context) { return some_handle(context); }
Result cuCtxSetCurrent(void* context) { return kSuccess; }
Result cuCtxGetLimit(size_t* value, int limit) { return *value = 1 << 20, kSuccess; }
Result cuCtxSetLimit(int limit, size_t value) { return kSuccess; }
Result cuDevicePrimaryCtxRetain(void** context, int device) { return some_handle(context); }
Result cuModuleLoadData(void** module, const void* image) { return some_handle(module); }
Result cuModuleUnload(void* module) { return kSuccess; }
Result cuFuncSetAttribute(void* function, int attribute, int value) { return kSuccess; }
Result cuFuncSetCacheConfig(void* function, int config) { return kSuccess; }
Result cuOccupancyMaxActiveClusters(int* count, void* function, const void* config) { return *count = 1, kSuccess; }
Result cuPointerGetAttributes(unsigned count, int* attributes, void** data, uint64_t pointer) { return kSuccess; }
Result cuTensorMapEncodeIm2col(void* map, ...) { return 801; }  // CUDA_ERROR_NOT_SUPPORTED: no kernel here needs it
