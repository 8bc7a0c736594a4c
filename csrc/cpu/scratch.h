// Work items on a pool of threads, each thread with scratch memory of its own.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "launch.h"

namespace gistkern::cpu {

// Asks for huge pages where fresh memory is large: touching it 4 KiB at a time takes as long as a fifth of the
// attention that fills it. Only advice, so a refusal does not matter.
inline void advise_huge_pages(void* memory, int64_t bytes) {
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

// 64-byte aligned floats; data() is null where memory ran out.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(floats > kMostFloats
                  ? nullptr
                  : static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 64) / 64 * 64))) {
    if (data_) advise_huge_pages(data_, floats * sizeof(float));
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() const { return data_; }

 private:
  static constexpr int64_t kMostFloats = int64_t{1} << 58;  // its bytes would still be counted in 64 bits
  float* data_;
};

// Calls item(index, scratch) for every index in [0, items), the lowest first; which thread takes which is left to the
// clock, so items must not share results. False where memory for scratch ran out.
template <typename Item>
bool for_items(const Pool& pool, int64_t items, int64_t scratch_floats, Item item) {
  struct Work {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    int64_t items, scratch_floats;
    Item& item;
  } work{{}, {}, items, scratch_floats, item};
  if (items == 0) return true;
  pool.run(
      pool.threads < items ? pool.threads : items,
      [](void* context) {
        Work& shared = *static_cast<Work*>(context);
        const Scratch scratch(shared.scratch_floats);
        if (!scratch.data()) {
          shared.failed = true;
          return;
        }
        for (int64_t i = shared.next++; i < shared.items; i = shared.next++) shared.item(i, scratch.data());
      },
      &work);
  return !work.failed;
}

constexpr const char* kOutOfMemory = "out of memory for the kernel's scratch space";

}  // namespace gistkern::cpu
