"""Facts about GPUs, in one place: architectures that kernels are compiled and tuned for, and cards with their peaks.

Sources of the architectures: NVIDIA CUDA C++ Programming Guide, table "Technical Specifications per Compute
Capability" (shared memory), and the vendors' datasheets (multiprocessors, L2 cache); AMD's CDNA 3 white paper for
gfx942, whose 4 MiB of L2 are per die.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["CHIPS", "GPUS", "LINKS", "Chip", "Gpu", "chip_for", "chip_named", "gpu_named"]


@dataclass(frozen=True)
class Chip:
    """One architecture. Sizes in bytes; `multiprocessors` and `l2_bytes` of the first example.

    `capability` is CUDA's; None for AMD. `tensor_memory_columns` are of 32 bits, in one multiprocessor.
    """

    arch: str
    capability: tuple[int, int] | None
    shared_per_block: int
    shared_per_multiprocessor: int
    multiprocessors: int
    l2_bytes: int
    example: str
    tensor_memory_columns: int = 0


_KB, _MB = 1024, 1024 * 1024

CHIPS = (
    Chip("sm_80", (8, 0), 163 * _KB, 164 * _KB, 108, 40 * _MB, "A100"),
    Chip("sm_86", (8, 6), 99 * _KB, 100 * _KB, 82, 6 * _MB, "RTX 3090, A40"),
    Chip("sm_89", (8, 9), 99 * _KB, 100 * _KB, 128, 72 * _MB, "RTX 4090, L40S"),
    Chip("sm_90", (9, 0), 227 * _KB, 228 * _KB, 132, 50 * _MB, "H100, H200"),
    Chip("sm_100", (10, 0), 227 * _KB, 228 * _KB, 148, 126 * _MB, "B200", 512),
    Chip("sm_120", (12, 0), 99 * _KB, 100 * _KB, 188, 128 * _MB, "RTX PRO 6000 Blackwell, RTX 5090"),
    Chip("gfx942", None, 64 * _KB, 64 * _KB, 304, 4 * _MB, "MI300X"),
)


def chip_named(arch: str) -> Chip:
    """The listed chip called `arch` (``sm_90``, ``gfx942``)."""
    return next(chip for chip in CHIPS if chip.arch == arch)


def chip_for(capability: tuple[int, int]) -> Chip | None:
    """The listed chip of a compute capability, or None."""
    return next((chip for chip in CHIPS if chip.capability == capability), None)


@dataclass(frozen=True)
class Gpu:
    """One card, with peaks as published; GB are 10^9 bytes.

    Parameters
    ----------
    name, arch : str
        `arch` is that of a chip.
    multiprocessors : int
        Of this card.
    flops : int
        Per second, of dense bf16 products with fp32 accumulation. Datasheets print twice as much "with sparsity", and
        GeForce cards halve the rate when they accumulate in fp32.
    bandwidth : int
        Bytes per second of the card's own memory.
    memory : int
        Bytes.
    source : str
        Where these numbers are printed.
    """

    name: str
    arch: str
    multiprocessors: int
    flops: int
    bandwidth: int
    memory: int
    source: str

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which arithmetic takes longer than memory."""
        return self.flops / self.bandwidth

    @property
    def chip(self) -> Chip:
        """Its architecture, with the multiprocessors of this card."""
        return replace(chip_named(self.arch), multiprocessors=self.multiprocessors)


_GIGA, _TERA = 10**9, 10**12

GPUS = (
    Gpu(
        "H100 SXM 80 GB",
        "sm_90",
        132,
        989_400 * _GIGA,
        3_350 * _GIGA,
        80 * _GIGA,
        "NVIDIA H100 Tensor Core GPU Architecture whitepaper (989.4 TFLOP/s); H100 datasheet (3.35 TB/s; its 1,979 "
        "TFLOP/s are with sparsity)",
    ),
    Gpu(
        "A100 SXM 80 GB",
        "sm_80",
        108,
        312 * _TERA,
        2_039 * _GIGA,
        80 * _GIGA,
        "NVIDIA A100 80GB datasheet (312 TFLOP/s, 624 with sparsity; 2,039 GB/s)",
    ),
    Gpu(
        "RTX 4090 24 GB",
        "sm_89",
        128,
        165_200 * _GIGA,
        1_008 * _GIGA,
        24 * _GIGA,
        "NVIDIA Ada GPU Architecture whitepaper, appendix A (165.2 TFLOP/s, 330.4 with sparsity; 1,008 GB/s)",
    ),
    Gpu(
        "L40S 48 GB",
        "sm_89",
        142,
        362_050 * _GIGA,
        864 * _GIGA,
        48 * _GIGA,
        "NVIDIA L40S datasheet (362.05 TFLOP/s, 733 with sparsity; 864 GB/s)",
    ),
)

# bytes per second that one GPU receives: NVLink 4 within a node (H100 datasheet: 900 GB/s both ways), one 400 Gb/s
# adapter per GPU between nodes (DGX H100 datasheet)
LINKS = {"NVLink": 450 * _GIGA, "InfiniBand": 50 * _GIGA}


def gpu_named(name: str) -> Gpu:
    """The listed card of this name."""
    return next(gpu for gpu in GPUS if gpu.name == name)
