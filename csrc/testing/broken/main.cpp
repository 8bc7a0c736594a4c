// broken NAME mistaken|correct: exit status 1 if the kernel's values are wrong, 2 for a wrong command line. One
// translation unit: most of a build's time is NVIDIA's headers.
#include "arrival.cu"
#include "async_copy.cu"
#include "block_race.cu"
#include "divergence.cu"
#include "misaligned.cu"
#include "missing_barrier.cu"
#include "out_of_bounds.cu"
#include "uninitialized.cu"

int main(int argc, char** argv) {
  using gistkern::broken::Case;
  if (argc != 3) return 2;
  const bool mistaken = std::strcmp(argv[2], "mistaken") == 0;
  for (const Case* item = Case::first; item != nullptr; item = item->next) {
    if (std::strcmp(item->name, argv[1]) != 0) continue;
    const bool right = item->run(mistaken);
    std::puts(right ? "values are right" : "values are wrong");
    return right ? 0 : 1;
  }
  return 2;
}
