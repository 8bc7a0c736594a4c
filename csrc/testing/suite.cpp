// suite [PART-OF-A-NAME ...]: the launchers on many cases against an oracle in double; no Python, no torch, so that
// sanitizers see nothing but the kernels. One line a case; exit status 1 if one failed or none was selected.
//
// GISTKERN_SUITE_SEED chooses the data, GISTKERN_EMULATOR_SEED the order of blocks and threads.
#include "suite/case.h"
#include "suite/compact_cases.h"
#include "suite/decode_cases.h"

namespace gistkern::suite {
namespace {

bool selected(const std::string& name, int count, char** parts) {
  for (int i = 0; i < count; ++i) {
    if (name.find(parts[i]) != std::string::npos) return true;
  }
  return count == 0;
}

int run_all(int count, char** parts) {
  const char* const text = std::getenv("GISTKERN_SUITE_SEED");
  const uint64_t seed = text == nullptr ? 1 : std::strtoull(text, nullptr, 10);
  std::vector<Case> cases;
  add_decode_cases(cases);
  add_compact_cases(cases);
  int outcomes[3] = {0, 0, 0};
  for (const Case& item : cases) {
    if (!selected(item.name, count, parts)) continue;
    const Outcome outcome = item.run(seed + std::hash<std::string>()(item.name));
    static constexpr const char* kWords[] = {"pass", "skip", "FAIL"};
    const int kind = static_cast<int>(outcome.kind);
    std::printf("%s %s %s\n", kWords[kind], item.name.c_str(), outcome.detail.c_str());
    std::fflush(stdout);
    ++outcomes[kind];
  }
  std::printf("%d passed, %d skipped, %d failed\n", outcomes[0], outcomes[1], outcomes[2]);
  return outcomes[2] > 0 || outcomes[0] == 0 ? 1 : 0;
}

}  // namespace
}  // namespace gistkern::suite

int main(int argc, char** argv) { return gistkern::suite::run_all(argc - 1, argv + 1); }
