// A named case: empty if it passed, otherwise what is wrong.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

namespace gistkern::suite {

struct Outcome {
  enum class Kind { kPassed, kSkipped, kFailed };
  Kind kind = Kind::kPassed;
  std::string detail;
};

struct Case {
  std::string name;
  std::function<Outcome(uint64_t seed)> run;
};

inline std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
inline std::string text(const char* format, ...) {
  char buffer[256];
  va_list values;
  va_start(values, format);
  std::vsnprintf(buffer, sizeof(buffer), format, values);
  va_end(values);
  return buffer;
}

inline Outcome passed() { return {}; }
inline Outcome skipped(const std::string& why) { return {Outcome::Kind::kSkipped, why}; }
inline Outcome failed(const std::string& what) { return {Outcome::Kind::kFailed, what}; }

}  // namespace gistkern::suite
