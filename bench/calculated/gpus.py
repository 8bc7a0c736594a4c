"""Published peak numbers of four GPUs, for bench/calculated/roofline.py.

FLOP/s: tensor cores, bf16 with fp32 accumulation, *dense*. Datasheets print twice as much "with sparsity", and GeForce
cards halve the rate when they accumulate in fp32. GB are 10^9 bytes, as in docs/memory.md.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GPUS", "Gpu", "gpu_named"]


@dataclass(frozen=True)
class Gpu:
    """One card.

    Parameters
    ----------
    name, arch : str
        `arch` as in kernels/chips.py.
    multiprocessors : int
        Of this card; the backward's gist columns are cut by it.
    flops : int
        Peak of dense bf16 products with fp32 accumulation, per second.
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


def gpu_named(name: str) -> Gpu:
    """The listed card of this name."""
    return next(gpu for gpu in GPUS if gpu.name == name)
