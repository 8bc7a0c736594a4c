"""What a batch costs before its first layer: the layout beside the masks that it replaces."""

from collections.abc import Collection

import torch
from torch.nn.attention.flex_attention import BlockMask

from bench.measured import flex
from bench.measured.case import OURS, Case
from bench.shapes import SEGMENTS
from gistkern import GistLayout

BASELINES = ("dense mask", "block mask")
GIST = 1_000_000  # first gist id


def layout_case(name: str, rows: int, device: str = "cpu", only: Collection[str] | None = None) -> Case:
    """Read the segments of `rows` token ids: into a layout, a dense mask, and FlexAttention's block mask."""
    ids, gist_ids = _ids(name, rows, device)
    calls = {OURS: lambda: GistLayout.from_input_ids(ids, gist_ids)}
    not_measured: dict[str, str] = {}
    layout = calls[OURS]()
    wanted = BASELINES if only is None else only
    if "dense mask" in wanted:
        assert torch.equal(_dense(ids), layout.token_mask()), "the dense mask is another rule"
        calls["dense mask"] = lambda: _dense(ids)
    if "block mask" in wanted:
        if reason := flex.why_not(layout, 1):
            not_measured["block mask"] = reason
        else:
            calls["block mask"] = lambda: _block_mask(ids)
            assert torch.equal(_block_mask(ids).to_dense()[0, 0].bool(), _blocks(layout)), (
                "the block mask is another rule"
            )
    return Case(device, calls, not_measured)


def _ids(name: str, rows: int, device: str) -> tuple[torch.Tensor, list[int]]:
    raw, gists = SEGMENTS[name] or (rows, 0)
    segment = [*range(raw), *range(GIST, GIST + gists)]
    stream = (segment * (rows // len(segment) + 1))[:rows]
    return torch.tensor([stream], device=device), list(range(GIST, GIST + max(gists, 1)))


def _facts(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The segment of every token, and which tokens are seen from all later segments: gists, and the first token."""
    is_gist = ids[0] >= GIST
    ends = is_gist[:-1] & ~is_gist[1:]
    segment = torch.cat([ends.new_zeros(1), ends]).cumsum(0)
    lasting = is_gist.clone()
    lasting[0] = True
    return segment, lasting


def _dense(ids: torch.Tensor) -> torch.Tensor:
    """The mask as a training script builds it, bool ``[1, N, N]``."""
    segment, lasting = _facts(ids)
    causal = torch.ones(len(segment), len(segment), dtype=torch.bool, device=ids.device).tril()
    return (causal & ((segment[:, None] == segment) | lasting))[None]


def _block_mask(ids: torch.Tensor) -> BlockMask:
    segment, lasting = _facts(ids)

    def seen(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= row) & ((segment[row] == segment[key]) | lasting[key])

    return flex.block_mask(seen, ids.shape[1], ids.shape[1], ids.device)


def _blocks(layout: GistLayout, size: int = 128) -> torch.Tensor:
    """Which blocks of the token mask hold anything."""
    mask = layout.token_mask()[0]
    short = -len(mask) % size
    padded = torch.nn.functional.pad(mask, (0, short, 0, short))
    return padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).any(3).any(1)
