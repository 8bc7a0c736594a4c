"""The GPUs that kernels are compiled and tuned for, as far as block sizes depend on them.

Sources: NVIDIA CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (shared
memory, registers) and the vendors' datasheets (multiprocessors, L2 cache); AMD's CDNA 3 white paper for gfx942, whose
4 MiB of L2 are per die.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHIPS", "Chip", "chip_for", "chip_named"]


@dataclass(frozen=True)
class Chip:
    """One architecture. Sizes in bytes; `multiprocessors` and `l2_bytes` of the first example.

    `capability` is CUDA's; None for AMD.
    """

    arch: str
    capability: tuple[int, int] | None
    shared_per_block: int
    shared_per_multiprocessor: int
    multiprocessors: int
    l2_bytes: int
    example: str


_KB, _MB = 1024, 1024 * 1024

CHIPS = (
    Chip("sm_80", (8, 0), 163 * _KB, 164 * _KB, 108, 40 * _MB, "A100"),
    Chip("sm_86", (8, 6), 99 * _KB, 100 * _KB, 82, 6 * _MB, "RTX 3090, A40"),
    Chip("sm_89", (8, 9), 99 * _KB, 100 * _KB, 128, 72 * _MB, "RTX 4090, L40S"),
    Chip("sm_90", (9, 0), 227 * _KB, 228 * _KB, 132, 50 * _MB, "H100, H200"),
    Chip("sm_100", (10, 0), 227 * _KB, 228 * _KB, 148, 126 * _MB, "B200"),
    Chip("sm_120", (12, 0), 99 * _KB, 100 * _KB, 188, 128 * _MB, "RTX PRO 6000 Blackwell, RTX 5090"),
    Chip("gfx942", None, 64 * _KB, 64 * _KB, 304, 4 * _MB, "MI300X"),
)


def chip_named(arch: str) -> Chip:
    """The listed chip called `arch` (``sm_90``, ``gfx942``)."""
    return next(chip for chip in CHIPS if chip.arch == arch)


def chip_for(capability: tuple[int, int]) -> Chip | None:
    """The listed chip of a compute capability, or None."""
    return next((chip for chip in CHIPS if chip.capability == capability), None)
