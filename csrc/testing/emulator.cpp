// The emulator's runtime as one translation unit, so that a build names one file. Build it with the same sanitizers as
// the kernels.
#include "emulator/collectives.inc"
#include "emulator/device.inc"
#include "emulator/fiber.inc"
#include "emulator/launch.inc"
#include "emulator/memory.inc"
#include "emulator/scheduler.inc"
#include "emulator/stall.inc"
