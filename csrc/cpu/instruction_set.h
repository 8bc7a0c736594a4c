// The table of kernels that this process uses.
#pragma once

#include "kernels.h"

namespace gistkern::cpu {

struct Chosen {
  const Kernels* kernels;
  const char* error;  // why there are none
};

// Decided at the first call.
const Chosen& chosen_kernels();

}  // namespace gistkern::cpu
