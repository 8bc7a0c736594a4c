// Who owns the counters in which the splits of a decode launch arrive.
//
// A launch needs one per unit, zero before it, and leaves zeros. Launches of one stream follow each other, so a stream
// has counters that all its launches use. A launch that is recorded into a graph gets some for itself: the graph may be
// replayed on any stream, beside anything. Counters of a device are never freed: 2 KiB a stream, 4 bytes a unit of a
// recorded launch.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "gistkern/plan.h"

namespace gistkern {

class Arrivals {
 public:
  // Counters for so many units (at most kMaxSplitUnits) of one launch on `stream`, of the current device. Null, or why
  // there are none.
  const char* of_launch(void* stream, int units, uint32_t** counters) {
    int device = 0;
    unsigned long long id = 0;
    bool captured = false;
    if (const char* error = current_device(device)) return error;
    if (const char* error = describe_stream(stream, id, captured)) return error;
    std::lock_guard<std::mutex> lock(mutex_);
    if (captured) return take(device, units, counters);
    uint32_t*& mine = of_stream_[{device, id}];
    if (mine == nullptr) {
      if (const char* error = take(device, kMaxSplitUnits, &mine)) return error;
    }
    *counters = mine;
    return nullptr;
  }

 private:
  struct Block {
    uint32_t* next = nullptr;
    int left = 0;
  };

  const char* take(int device, int units, uint32_t** counters) {
    constexpr int kBlock = 1 << 16;
    Block& block = blocks_[device];
    if (block.left < units) {
      void* memory = nullptr;
      if (const char* error = allocate_zeros(kBlock * sizeof(uint32_t), &memory)) return error;
      block = {static_cast<uint32_t*>(memory), kBlock};
    }
    *counters = block.next;
    block.next += units;
    block.left -= units;
    return nullptr;
  }

  std::mutex mutex_;
  std::map<std::pair<int, unsigned long long>, uint32_t*> of_stream_;
  std::map<int, Block> blocks_;
};

}  // namespace gistkern
