// The CPU launchers: they cut a call into work items, hand those to a pool of threads and put results together.
#pragma once

#include "arguments.h"

namespace gistkern::cpu {

// A pool: calls body(context) on up to as many threads as it has, `threads` of them wanted.
struct Pool {
  void (*run)(int64_t threads, void (*body)(void* context), void* context);
  int64_t threads;
};

// All return null, or an error message with static storage.
const char* attention_forward(const AttentionArguments& arguments, const Pool& pool);
const char* attention_backward(const AttentionArguments& arguments, const Pool& pool);
const char* decode(const DecodeArguments& arguments, const Pool& pool);
const char* compact(const CompactArguments& arguments, const Pool& pool);

// Name of the instruction set in use: the best this processor has, or GISTKERN_CPU_ISA. Null with `error` set where
// that variable names none that can run here.
const char* instruction_set(const char** error);

}  // namespace gistkern::cpu
