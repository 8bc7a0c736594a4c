"""FlexAttention (torch.nn.attention.flex_attention), compiled: the mask rule as a function of row and key."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.measured.timing import largest
from gistkern import GistLayout


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., torch.Tensor]:
    # one compilation per shape; beyond the limit dynamo would run it uncompiled and say nothing
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # a backward that is timed keeps its graph, which donated buffers forbid
    torch._functorch.config.donated_buffer = False
    return torch.compile(flex_attention, dynamic=False)


def block_mask(rule: Callable[..., torch.Tensor], rows: int, keys: int, device: torch.device) -> BlockMask:
    """Which blocks the rule touches. Compiled, which takes seconds, where the pairs would not fit into memory."""
    fits = _pair_bytes(rows, keys) <= largest(device)
    make = create_block_mask if fits or device.type == "cpu" else torch.compile(create_block_mask, dynamic=False)
    return make(rule, None, None, rows, keys, device=device)


def _pair_bytes(rows: int, keys: int) -> int:
    """Uncompiled, the rule answers for every pair in one tensor of 8 bytes each."""
    return 8 * rows * keys


def natural(layout: GistLayout) -> Callable[..., torch.Tensor]:
    """Keys where they stand in the stream."""
    begin, end, local = layout.gist_begin[0], layout.gist_end[0], layout.local_begin[0]
    place = torch.full((layout.num_rows,), -1, dtype=torch.int32, device=layout.device)
    place[layout.gather[0]] = torch.arange(layout.num_compact, dtype=torch.int32, device=layout.device)

    def seen(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = (key >= local[row]) & (key <= row)
        return own | ((place[key] >= begin[row]) & (place[key] < end[row]))

    mask = block_mask(seen, layout.num_rows, layout.num_rows, layout.device)
    attend = _compiled()
    return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=True)


def permuted(layout: GistLayout, options: dict[str, Any] | None = None) -> Callable[..., torch.Tensor]:
    """Keys as [gists, raw], which leaves whole blocks to skip; putting them so is part of the call.

    `options` are FlexAttention's ``kernel_options``.
    """
    begin, end, local = layout.gist_begin[0], layout.gist_end[0], layout.local_begin[0]
    gists, gather = layout.num_compact, layout.gather[0]

    def seen(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = (key >= gists + local[row]) & (key <= gists + row)
        return own | ((key >= begin[row]) & (key < end[row]))

    mask = block_mask(seen, layout.num_rows, gists + layout.num_rows, layout.device)
    attend = _compiled()

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = (torch.cat([t[:, :, gather], t], 2) for t in (k, v))
        return attend(q, keys, values, block_mask=mask, enable_gqa=True, kernel_options=options)

    return call


def why_not(layout: GistLayout, heads: int) -> str:
    """Whether its block mask can be made."""
    size = _pair_bytes(layout.num_rows, layout.num_rows + layout.num_compact)
    if layout.device.type == "cuda" or size <= largest(layout.device):
        return ""
    return f"making its block mask would take {size / 2**30:.1f} GiB"


def why_not_natural(layout: GistLayout, heads: int) -> str:
    """The same, and a token that is listed twice has no single place."""
    if len(layout.gather[0].unique()) < layout.gather.shape[1]:
        return "a token stands twice among the compact rows"
    return why_not(layout, heads)


def no_backward(layout: GistLayout) -> str:
    """Why it cannot be differentiated."""
    return "FlexAttention has no backward on CPU" if layout.device.type == "cpu" else ""
