// A kernel with one mistake, and the same kernel without it: proof that a check finds the one and leaves the other
// alone.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "emulator.h"

namespace gistkern::broken {

struct Case {
  // Runs the kernel with (true) or without the mistake. False: the values it computed are wrong.
  using Run = bool (*)(bool mistaken);
  Case(const char* name, Run run) : name(name), run(run), next(first) { first = this; }

  const char* name;
  Run run;
  Case* next;
  inline static Case* first = nullptr;
};

// 0, 1, 2, ... in an allocation of exactly `count` floats
inline std::vector<float> counting(int count) {
  std::vector<float> values(count);
  std::iota(values.begin(), values.end(), 0.0f);
  return values;
}

template <typename... Arguments>
void launch_one(Arguments... arguments) {
  if (const char* error = launch(arguments...)) std::printf("launch failed: %s\n", error);
}

}  // namespace gistkern::broken
