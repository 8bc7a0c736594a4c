// What the sanitizers must be told about fibers and memory; nothing in a plain build.
#pragma once

#include <cstddef>
#include <cstdlib>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();
extern "C" void __tsan_ignore_thread_end();
#endif

namespace gistkern::emulator {

#ifdef __SANITIZE_THREAD__
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

inline void poison([[maybe_unused]] const void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(memory, bytes);
#endif
}

inline void unpoison([[maybe_unused]] const void* memory, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

// The scheduler touches what belongs to every thread. Its own accesses are not the kernel's and are not recorded.
struct UnrecordedScope {
#ifdef __SANITIZE_THREAD__
  UnrecordedScope() { __tsan_ignore_thread_begin(); }
  ~UnrecordedScope() { __tsan_ignore_thread_end(); }
#else
  UnrecordedScope() {}
#endif
};

}  // namespace gistkern::emulator
