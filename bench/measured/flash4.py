"""FlashAttention-4 (flash_attn.cute) under the mask rule: `mask_mod` for the pairs, lists of blocks for what to skip.

Keys as [gists, raw], as FlexAttention has them. Untouched blocks are in no list, blocks that every row sees whole skip
`mask_mod`.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.measured.timing import largest
from gistkern import GistLayout

PACKAGE = "flash_attn.cute"
# rows and keys: what its Hopper kernels take for head dimension 128, forward and backward
BLOCK = 128, 128


class Blocks(NamedTuple):
    """Which blocks of each line are looked at: how many, int32 ``[1, 1, lines]``, and ``[1, 1, lines, blocks]``."""

    masked_count: torch.Tensor
    masked: torch.Tensor
    full_count: torch.Tensor
    full: torch.Tensor

    @classmethod
    def of(cls, masked: torch.Tensor, full: torch.Tensor) -> "Blocks":
        """Of boolean ``[lines, blocks]`` each."""
        return cls(*_listed(masked), *_listed(full))


def _listed(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    count = wanted.sum(1, dtype=torch.int32)
    places = (~wanted).to(torch.uint8).argsort(dim=1, stable=True).to(torch.int32)
    return count[None, None].contiguous(), places[None, None].contiguous()


def touched(layout: GistLayout, block: tuple[int, int] = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks ``[of rows, of keys]`` of which some pair is seen but not every one, and of which every pair is."""
    high, wide = block
    begin, end, local = (
        vector[0].long()[:, None] for vector in (layout.gist_begin, layout.gist_end, layout.local_begin)
    )
    gists, rows = layout.num_compact, layout.num_rows
    row = torch.arange(rows, device=layout.device)[:, None]
    first = torch.arange(0, gists + rows, wide, device=layout.device)

    def inside(low: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        return (past.clamp(max=first + wide) - low.clamp(min=first)).clamp(min=0)

    pairs = inside(begin, end) + inside(gists + local, gists + row + 1)  # of each row within each block of keys
    pairs = F.pad(pairs, (0, 0, 0, -rows % high)).view(-1, high, len(first)).sum(1)
    full = pairs == high * wide
    return (pairs > 0) & ~full, full


def options_of(layout: GistLayout) -> dict[str, Any]:
    """Keyword arguments of ``flash_attn_func`` for keys ordered [gists, raw]."""
    masked, full = touched(layout)
    gists = layout.num_compact
    vectors = layout.gist_begin[0], layout.gist_end[0], gists + layout.local_begin[0]
    tensors = importlib.import_module(f"{PACKAGE}.block_sparsity").BlockSparseTensorsTorch
    return {
        "mask_mod": _mask_mod(gists),
        "aux_tensors": [vector.int().contiguous() for vector in vectors],
        "block_sparse_tensors": tensors(*Blocks.of(masked, full), block_size=BLOCK),
        "block_sparse_tensors_bwd": tensors(*Blocks.of(masked.T, full.T), block_size=BLOCK),
        "pack_gqa": False,
    }


@functools.cache
def _mask_mod(gists: int) -> Callable[..., Any]:
    """The rule in CuTe's language, of a row's place and a key's; compiled anew for each number of gists."""
    cutlass, cute = importlib.import_module("cutlass"), importlib.import_module("cutlass.cute")
    scalar = importlib.import_module(f"{PACKAGE}.utils").scalar_to_ssa

    @cute.jit
    def seen(batch, head, row, key, lengths, vectors):
        begin = scalar(vectors[0][row[0]], cutlass.Int32)
        end = scalar(vectors[1][row[0]], cutlass.Int32)
        local = scalar(vectors[2][row[0]], cutlass.Int32)
        last = row + scalar(gists, cutlass.Int32)
        return ((key >= begin) & (key < end)) | ((key >= local) & (key <= last))

    return seen


def masked(layout: GistLayout) -> Callable[..., torch.Tensor]:
    """Planned once; putting keys in order is part of the call."""
    attend = importlib.import_module(PACKAGE).flash_attn_func
    options, gather = options_of(layout), layout.gather[0]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = (torch.cat([t[:, :, gather], t], 2).transpose(1, 2) for t in (k, v))
        found = attend(q.transpose(1, 2), keys, values, **options)
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return call


def why_not(layout: GistLayout, heads: int) -> str:
    """Whether its lists of blocks can be made."""
    size = 16 * layout.num_rows * (-(-(layout.num_rows + layout.num_compact) // BLOCK[1]))
    return f"making its lists of blocks would take {size / 2**30:.1f} GiB" if size > largest(layout.device) else ""
