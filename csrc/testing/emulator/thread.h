// The state of the launch: threads, the block that runs, and the order they are picked in.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "emulator.h"
#include "emulator/fiber.h"

namespace gistkern::emulator {

constexpr uint32_t kWarp = 32;

struct AsyncCopy {
  char* destination;
  const char* source;
  int valid_bytes;
  int group;
};

struct Thread {
  enum class State { kReady, kWaiting, kFinished, kFailed };

  Thread();
  uint32_t lane() const { return rank % kWarp; }
  uint32_t warp() const { return rank / kWarp; }

  Fiber fiber;
  Indices indices;
  uint32_t rank;  // in its block
  State state;

  // what it waits for, what it brought (bits) and what it took away
  Meeting meeting;
  uint32_t mask;
  uint32_t brought[10];
  uint32_t result[4];
  const void* row;  // of load_matrix

  std::vector<AsyncCopy> copies;
  int groups_committed;
  bool awaited;  // the launches before an early one
};

// Lanes of one warp that wait for the same collective with the same mask.
struct Group {
  Meeting meeting;
  uint32_t mask;
  uint32_t arrived;
};

struct Block {
  std::vector<Thread*> threads;
  std::vector<std::vector<Group>> groups;  // by warp
  std::vector<Thread*> ready;
  uint32_t at_barrier = 0;
  uint32_t finished = 0;
  char* shared = nullptr;
  size_t shared_bytes = 0;
};

// splitmix64
struct Random {
  uint64_t state;
  uint32_t below(uint32_t bound) {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(((z ^ (z >> 31)) >> 32) * bound >> 32);
  }
};

struct Launch {
  dim3 grid, block;
  void (*body)(const void*);
  const void* arguments;
  bool early;
  Fiber* scheduler;
  Block* running_block;
  Thread* running_thread;
};

extern Launch launched;
extern EmulatorCounts counts;
extern std::string failure;  // the message of the launch that runs; empty while it is well

const char* name_of(Meeting meeting);

// memory
void allocate_shared(Block& block, size_t bytes);
void free_shared(Block& block);
void finish_copies(Thread& thread);

// Puts the running thread to sleep until the scheduler has completed the meeting.
Thread& meet(Meeting meeting, uint32_t mask);
// Computes the results of a collective from what the lanes brought.
void complete(const Group& group, Thread* const* lanes);

// Runs every thread of the block to its end. False: `failure` says why not.
bool run_block(Block& block, Random& random);
// Why no thread of the block can go on.
std::string describe_stall(const Block& block);
// Stores or, by default, prints a message and aborts.
void report(const std::string& message);

}  // namespace gistkern::emulator
