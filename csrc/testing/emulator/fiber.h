// A stack that can be switched to: one per CUDA thread, and one for the scheduler.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace gistkern::emulator {

class Fiber {
 public:
  // The stack this constructor is called on: the scheduler's.
  Fiber();
  // A new stack. The first switch to it calls entry(argument), which never returns.
  Fiber(void (*entry)(void*), void* argument);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Continues `to`; returns when another fiber switches back to this one.
  void switch_to(Fiber& to);

  // Everything the first fibers did so far happens before what the second do next, in the eyes of TSan. A switch alone
  // orders nothing.
  static void order(Fiber* const* before, size_t before_count, Fiber* const* after, size_t after_count);

 private:
  static void first_entry(Fiber* self);
  void finish_switch(Fiber* from);

  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  void* mapping_ = nullptr;
  const void* stack_bottom_ = nullptr;
  size_t stack_bytes_ = 0;
  Fiber* switched_from_ = nullptr;
  void* fake_stack_ = nullptr;  // ASan's
  void* tsan_ = nullptr;        // TSan's
#ifdef __x86_64__
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace gistkern::emulator
