// Which of the compiled instruction sets runs: the best that this processor has, or the one GISTKERN_CPU_ISA names.
#include "instruction_set.h"

#include <cstdlib>
#include <cstring>

namespace gistkern::cpu {
namespace {

bool runs_here(const Kernels& kernels) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&kernels == &avx2::kKernels) return avx2;
  if (&kernels == &avx512::kKernels) {
#if defined(GISTKERN_NARROW_AVX512)  // test builds: the 16-lane source, compiled for AVX2
    return avx2;
#else
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
  }
#endif
  return &kernels == &baseline::kKernels;
}

const Kernels* const kCandidates[] = {
#if defined(__x86_64__)
#if !defined(GISTKERN_NARROW_AVX512)
    &avx512::kKernels,
#endif
    &avx2::kKernels,
#if defined(GISTKERN_NARROW_AVX512)
    &avx512::kKernels,
#endif
#endif
    &baseline::kKernels,
};

Chosen choose() {
  const char* wanted = std::getenv("GISTKERN_CPU_ISA");
  if (wanted && *wanted == '\0') wanted = nullptr;
  for (const Kernels* kernels : kCandidates) {
    if (wanted && std::strcmp(wanted, kernels->name) != 0) continue;
    if (runs_here(*kernels)) return {kernels, nullptr};
    if (wanted) return {nullptr, "GISTKERN_CPU_ISA names an instruction set that this processor lacks"};
  }
  return {nullptr, "GISTKERN_CPU_ISA must be avx512, avx2 or baseline, as compiled for this processor's family"};
}

}  // namespace

const Chosen& chosen_kernels() {
  static const Chosen chosen = choose();
  return chosen;
}

}  // namespace gistkern::cpu
