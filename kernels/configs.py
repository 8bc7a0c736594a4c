"""Block sizes, warps and pipeline stages of every kernel, per architecture, head dimension and precision.

Chosen by compiling (docs/internals/compiled.md): for 16-bit inputs, of the tiles that neither spill registers nor
exceed the chip's shared memory, those that move the fewest bytes per product. fp32 fits in shared memory too, but
in IEEE precision it spills from head dimension 64 on some chips. Forward and backward on an H100 at head dimensions 64
and 128 were chosen by timing (docs/internals/kernels.md, Tiles); no other row has been timed.
`autotune.py` measures a device and writes a JSON file; the environment variable GISTKERN_CONFIGS names the file
to use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from gistkern.kernels.tuned import ENVIRONMENT, FIELDS, lookup

__all__ = [
    "HOPPER",
    "KERNELS",
    "Config",
    "HopperConfig",
    "family_of",
    "overridden",
    "pick",
    "pick_hopper",
    "width_class",
]

KERNELS = ("fwd", "bwd_dq", "bwd_dkv", "decode", "compact")


@dataclass(frozen=True)
class Config:
    """How one kernel is cut: tiles of `block_rows` packed query rows by `block_cols` key rows.

    `two_loops` runs tiles without a mask in a loop of their own; `why` says what decided the tile.
    """

    block_rows: int
    block_cols: int
    num_warps: int
    num_stages: int
    why: str
    two_loops: bool = False


@dataclass(frozen=True)
class HopperConfig:
    """How Hopper's warp-specialized kernels of one direction are cut, and whether calls take them unasked.

    Tiles of `block_cols` columns stand in a ring of `num_stages`; `why` says what decided both.
    """

    block_cols: int
    num_stages: int
    chosen: bool
    why: str


_UNTIMED = "compiled and emulated; no GPU has run it, so calls take the plain kernels until both have been timed"
# (direction, head dimension) -> row; forward and backward are chosen apart
HOPPER = {
    ("fwd", 64): HopperConfig(128, 4, False, _UNTIMED),
    ("fwd", 128): HopperConfig(128, 2, False, _UNTIMED),
    ("bwd", 64): HopperConfig(64, 4, False, _UNTIMED),
    ("bwd", 128): HopperConfig(64, 4, False, _UNTIMED),
}


def pick_hopper(direction: str, head_dim: int) -> HopperConfig:
    """The row of a direction, ``"fwd"`` or ``"bwd"``, at a head dimension; without one, a row that is not chosen."""
    return HOPPER.get((direction, head_dim), HopperConfig(64, 2, False, "no kernel"))


# architectures whose limits and tensor-core instructions call for the same tiles
_FAMILIES = {
    "sm_80": "sm_80",  # mma.sync, 163 KiB of shared memory per block
    "sm_86": "small",  # mma.sync, 99 KiB
    "sm_89": "small",
    "sm_120": "small",
    "sm_90": "sm_90",  # wgmma on tiles of 64 rows, 227 KiB
    "sm_100": "sm_100",  # tcgen05 with accumulators in tensor memory, 227 KiB
    "gfx942": "gfx942",  # MFMA, 64 KiB, 512 registers
}

# One loop with a branch around the mask keeps wgmma asynchronous on Hopper. Elsewhere the branch between the two
# products makes Triton pass the probabilities through shared memory, and two loops take a sixth fewer instructions.
_TWO_LOOPS = ("sm_80", "small", "sm_100")

# why-texts that several rows share
_MEASURED = "the fastest of its neighbors that does not spill, on an H100 (docs/internals/kernels.md, Tiles)"
_RATIO = "128 rows halve the K/V traffic of 64; more columns only add rounding to the gist interval"
_SPILLS = "larger tiles spill registers"
_TENSOR_MEMORY = "accumulators live in tensor memory, so registers allow what shared memory does"
_SHARED = "shared memory decides: operands are staged for every product of the step"
_NARROW = "64 columns: 128 would take a quarter more FLOPs at the segments' diagonals (docs/internals/work.md)"
_FMA = "IEEE fp32 (the default) multiplies without tensor cores, operands in registers: small tiles"
_FMA_SPILLS = "IEEE fp32 holds two whole rows of operands in registers and spills at any tile size"
_WIDE = "a row of 256 leaves registers for few rows"
_LDS = "64 KiB of LDS"
_MEMORY_BOUND = "streams K and V once: columns for bytes in flight, rows are only the packed heads"
_COPY = "copies rows; the gradient compares tiles of entries with each other"

# (kernel, bytes per element, padded head dimension) -> family -> (rows, columns, warps, stages, why)
_TABLE: dict[tuple[str, int, int], dict[str, tuple[int, int, int, int, str]]] = {
    ("fwd", 2, 64): {
        "sm_80": (128, 64, 8, 3, _RATIO),
        "small": (128, 64, 8, 3, _RATIO),
        "sm_90": (64, 64, 4, 3, _MEASURED),
        "sm_100": (64, 64, 4, 3, _SPILLS),
        "gfx942": (128, 64, 4, 1, _LDS),
    },
    ("fwd", 2, 128): {
        "sm_80": (128, 64, 8, 3, _RATIO),
        "small": (128, 64, 8, 2, _SHARED),
        "sm_90": (64, 32, 4, 3, _MEASURED),
        "sm_100": (128, 64, 8, 3, _RATIO),
        "gfx942": (128, 32, 4, 1, _LDS),
    },
    ("fwd", 2, 256): {
        "sm_80": (64, 32, 8, 2, _WIDE),
        "small": (64, 32, 8, 2, _WIDE),
        "sm_90": (64, 64, 8, 2, _WIDE),
        "sm_100": (64, 64, 8, 2, _WIDE),
        "gfx942": (64, 32, 4, 1, _LDS),
    },
    ("bwd_dq", 2, 64): {
        "sm_80": (64, 32, 4, 3, _SPILLS),
        "small": (64, 32, 4, 3, _SPILLS),
        "sm_90": (64, 32, 4, 3, _MEASURED),
        "sm_100": (128, 64, 8, 3, _TENSOR_MEMORY),
        "gfx942": (64, 32, 4, 1, _LDS),
    },
    ("bwd_dq", 2, 128): {
        "sm_80": (64, 32, 4, 3, _SPILLS),
        "small": (64, 32, 4, 3, _SPILLS),
        "sm_90": (64, 32, 4, 3, _MEASURED),
        "sm_100": (128, 64, 8, 3, _TENSOR_MEMORY),
        "gfx942": (64, 32, 4, 1, _LDS),
    },
    ("bwd_dq", 2, 256): {
        "sm_80": (64, 32, 8, 2, _WIDE),
        "small": (32, 32, 4, 2, _SHARED),
        "sm_90": (64, 64, 8, 2, _WIDE),
        "sm_100": (64, 32, 8, 2, _SHARED),
        "gfx942": (32, 32, 4, 1, _LDS),
    },
    ("bwd_dkv", 2, 64): {
        "sm_80": (32, 64, 4, 3, _NARROW),
        "small": (32, 64, 4, 3, _NARROW),
        "sm_90": (32, 64, 4, 3, _MEASURED),
        "sm_100": (64, 64, 8, 3, _NARROW),
        "gfx942": (32, 64, 4, 1, _LDS),
    },
    ("bwd_dkv", 2, 128): {
        "sm_80": (64, 64, 8, 3, _SPILLS),
        "small": (64, 64, 8, 2, _SPILLS),
        "sm_90": (32, 64, 4, 3, _MEASURED),
        "sm_100": (64, 64, 8, 2, _NARROW),
        "gfx942": (32, 64, 4, 1, _LDS),
    },
    ("bwd_dkv", 2, 256): {
        "sm_80": (32, 32, 4, 2, _WIDE),
        "small": (16, 32, 4, 1, _SHARED),
        "sm_90": (64, 32, 8, 2, _WIDE),
        "sm_100": (32, 64, 8, 2, _SHARED),
        "gfx942": (16, 32, 4, 1, _LDS),
    },
    ("decode", 2, 64): {
        "sm_80": (64, 128, 4, 3, _MEMORY_BOUND),
        "small": (64, 128, 4, 2, _MEMORY_BOUND),
        "sm_90": (64, 128, 4, 3, _MEMORY_BOUND),
        "sm_100": (64, 128, 4, 3, _MEMORY_BOUND),
        "gfx942": (64, 64, 4, 1, _LDS),
    },
    ("decode", 2, 128): {
        "sm_80": (64, 64, 4, 3, _MEMORY_BOUND),
        "small": (64, 32, 4, 3, _SPILLS),
        "sm_90": (64, 64, 4, 3, _MEMORY_BOUND),
        "sm_100": (64, 64, 4, 3, _MEMORY_BOUND),
        "gfx942": (64, 64, 4, 1, _LDS),
    },
    ("decode", 2, 256): {
        "sm_80": (64, 32, 4, 2, _MEMORY_BOUND),
        "small": (64, 32, 4, 2, _MEMORY_BOUND),
        "sm_90": (64, 32, 4, 2, _MEMORY_BOUND),
        "sm_100": (64, 32, 4, 2, _MEMORY_BOUND),
        "gfx942": (64, 32, 4, 1, _LDS),
    },
    ("fwd", 4, 64): {
        "sm_80": (64, 64, 8, 1, _FMA),
        "small": (64, 64, 8, 1, _FMA),
        "sm_90": (64, 32, 8, 1, _FMA),
        "sm_100": (64, 32, 8, 1, _FMA),
        "gfx942": (64, 32, 4, 1, _LDS),
    },
    ("bwd_dq", 4, 64): dict.fromkeys(_FAMILIES.values(), (32, 32, 8, 1, _FMA)),
    ("bwd_dkv", 4, 64): {
        "sm_80": (32, 64, 8, 1, _FMA),
        "small": (32, 64, 8, 1, _FMA),
        "sm_90": (32, 32, 8, 1, _FMA),
        "sm_100": (32, 32, 8, 1, _FMA),
        "gfx942": (32, 32, 4, 1, _LDS),
    },
    ("fwd", 4, 128): {
        "sm_80": (64, 64, 8, 1, _FMA),
        "small": (64, 64, 8, 1, _FMA),
        "sm_90": (64, 64, 8, 1, _FMA),
        "sm_100": (64, 64, 8, 1, _FMA),
        "gfx942": (32, 32, 4, 1, _LDS),
    },
    ("bwd_dq", 4, 128): dict.fromkeys(_FAMILIES.values(), (32, 32, 8, 1, _FMA_SPILLS)),
    ("bwd_dkv", 4, 128): {
        "sm_80": (64, 32, 8, 1, _FMA),
        "small": (32, 32, 8, 1, _SHARED),
        "sm_90": (32, 64, 8, 1, _FMA),
        "sm_100": (32, 64, 8, 1, _FMA),
        "gfx942": (16, 16, 4, 1, _LDS),
    },
    ("fwd", 4, 256): dict.fromkeys(_FAMILIES.values(), (32, 32, 8, 1, _WIDE)),
    ("bwd_dq", 4, 256): dict.fromkeys(_FAMILIES.values(), (16, 32, 8, 1, _FMA_SPILLS)),
    ("bwd_dkv", 4, 256): {
        "sm_80": (32, 32, 8, 1, _FMA),
        "small": (16, 16, 8, 1, _SHARED),
        "sm_90": (32, 32, 8, 1, _FMA),
        "sm_100": (32, 32, 8, 1, _FMA),
        "gfx942": (16, 16, 4, 1, _LDS),
    },
    ("decode", 4, 64): dict.fromkeys(_FAMILIES.values(), (64, 32, 4, 1, _MEMORY_BOUND)),
    ("decode", 4, 128): dict.fromkeys(_FAMILIES.values(), (64, 64, 4, 1, _MEMORY_BOUND)),
    ("decode", 4, 256): dict.fromkeys(_FAMILIES.values(), (64, 32, 4, 1, _MEMORY_BOUND)),
    **{
        ("compact", itemsize, width): dict.fromkeys(_FAMILIES.values(), (rows, rows, 4, 1, _COPY))
        for itemsize in (2, 4)
        for width, rows in ((64, 32), (128, 16), (256, 16))
    },
}

# head dimensions that are no power of two pay registers for the mask of their padding: where that spills
_PADDING = "the mask of the padding makes the larger tile spill"
_PADDED: dict[tuple[str, int, int], dict[str, tuple[int, int, int, int, str]]] = {
    ("fwd", 2, 128): {"sm_80": (128, 32, 8, 2, _PADDING), "small": (128, 32, 8, 2, _PADDING)},
    ("fwd", 2, 256): {"sm_80": (32, 32, 4, 2, _PADDING), "small": (32, 32, 4, 2, _PADDING)},
    ("bwd_dkv", 2, 256): {"sm_80": (32, 32, 8, 2, _PADDING), "sm_100": (32, 32, 8, 2, _PADDING)},
}

_override: dict[str, Config] = {}
# how often the choice has changed in this process, so that nobody goes on with kernels of another one
changes = 0


def family_of(arch: str) -> str:
    """The tuning family of an architecture; an unlisted one gets the tiles that fit everywhere on its make."""
    if arch in _FAMILIES:
        return _FAMILIES[arch]
    if arch.startswith("gfx"):
        return "gfx942"
    return "sm_100" if arch in ("sm_101", "sm_103", "sm_110") else "small"


def width_class(width: int) -> int:
    """The column of the table that serves tiles of `width` (padded head dimension) columns: 64, 128 or 256."""
    return max(64, width)


def pick(kernel: str, arch: str, width: int, itemsize: int, head_dim: int | None = None) -> Config:
    """The config of a kernel of `KERNELS` for tiles of `width` columns (padded head dimension) of `itemsize` bytes.

    `head_dim` is the dimension before padding, `width` itself if not given.

    Raises
    ------
    ValueError
        If GISTKERN_CONFIGS names a file that is broken or made for another device.
    """
    if kernel in _override:
        return _override[kernel]
    family = family_of(arch)
    two_loops = kernel in ("fwd", "decode") and family in _TWO_LOOPS
    if measured := lookup(kernel, arch, width, itemsize):
        sizes = {field: measured[field] for field in FIELDS}
        return Config(**sizes, why=f"measured, {ENVIRONMENT}", two_loops=two_loops)
    key = kernel, itemsize, width_class(width)
    choice = _TABLE[key][family]
    if head_dim is not None and head_dim != width:
        choice = _PADDED.get(key, {}).get(family, choice)
    rows, cols, warps, stages, why = choice
    return Config(rows, cols, warps, stages, why, two_loops)


@contextlib.contextmanager
def overridden(**configs: Config) -> Iterator[None]:
    """Use these configs, by kernel name, within the block (tests of tile boundaries, autotuning)."""
    if unknown := set(configs) - set(KERNELS):
        raise ValueError(f"unknown kernel {sorted(unknown)}: expected some of {', '.join(KERNELS)}")
    global changes
    before = dict(_override)
    _override.update(configs)
    changes += 1
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)
        changes += 1
