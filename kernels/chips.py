"""The GPUs that kernels are compiled and tuned for, as far as block sizes depend on them.

Sources: NVIDIA CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability" (shared
memory, registers) and the vendors' datasheets (multiprocessors).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CHIPS", "Chip", "chip_for"]


@dataclass(frozen=True)
class Chip:
    """One compute capability. Sizes in bytes; `multiprocessors` of its largest shipped card."""

    arch: str
    capability: tuple[int, int]
    shared_per_block: int
    shared_per_multiprocessor: int
    multiprocessors: int
    example: str


CHIPS = (
    Chip("sm_80", (8, 0), 163 * 1024, 164 * 1024, 108, "A100"),
    Chip("sm_86", (8, 6), 99 * 1024, 100 * 1024, 84, "RTX 3090, A40"),
    Chip("sm_89", (8, 9), 99 * 1024, 100 * 1024, 142, "L40S, RTX 4090 (128)"),
    Chip("sm_90", (9, 0), 227 * 1024, 228 * 1024, 132, "H100, H200"),
    Chip("sm_100", (10, 0), 227 * 1024, 228 * 1024, 148, "B200"),
    Chip("sm_120", (12, 0), 99 * 1024, 100 * 1024, 188, "RTX PRO 6000 Blackwell, RTX 5090 (170)"),
)


def chip_for(capability: tuple[int, int]) -> Chip | None:
    """The listed chip of a compute capability, or None."""
    return next((chip for chip in CHIPS if chip.capability == capability), None)
