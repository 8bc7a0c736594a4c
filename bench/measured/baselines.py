"""What a user would run instead of gistkern's attention: each the best way we know to write it.

A baseline plans once, outside the clock, whatever depends on the layout alone (masks, indices, block masks), as one
would for all layers of a model. Its answer on the same inputs must be ours, except where it ignores the mask on
purpose. Layouts of one batch row only; packed documents are one row.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.measured import flash4, flex
from bench.measured.timing import largest
from gistkern import GistLayout, gist_attention

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Run(NamedTuple):
    """Rows ``[begin, end)``, which see compact rows ``[gist_begin, gist_end)`` and their own from `local_begin` on."""

    begin: int
    end: int
    gist_begin: int
    gist_end: int
    local_begin: int

    @property
    def rows(self) -> int:
        """Query rows."""
        return self.end - self.begin

    @property
    def keys(self) -> int:
        """Keys that the last row sees."""
        return self.gist_end - self.gist_begin + self.end - self.local_begin


def runs_of(layout: GistLayout) -> list[Run]:
    """The runs of a layout of one batch row; ValueError if it has more, or rows of earlier calls."""
    if layout.batch_size != 1 or layout.past or layout.tail:
        raise ValueError("baselines take layouts of one batch row without rows of earlier calls")
    vectors = torch.cat([layout.gist_begin, layout.gist_end, layout.local_begin])
    changes = (vectors[:, 1:] != vectors[:, :-1]).any(0).nonzero().flatten() + 1
    begins = [0, *changes.tolist()]
    seen = vectors[:, begins].T.tolist()
    ends = [*begins[1:], layout.num_rows]
    return [Run(begin, end, *row) for begin, end, row in zip(begins, ends, seen, strict=True)]


@dataclass(frozen=True)
class Baseline:
    """`plan` gives the function of q, k and v to time; `why_not` says why it cannot serve, or nothing.

    `backward` is whether it can be differentiated on that device; `masked` whether it computes what the layout says.
    """

    title: str
    plan: Callable[[GistLayout], Attention]
    why_not: Callable[[GistLayout, int], str] = lambda layout, heads: ""
    no_backward: Callable[[GistLayout], str] = lambda layout: ""
    masked: bool = True


def _ours(layout: GistLayout) -> Attention:
    return lambda q, k, v: gist_attention(q, k, v, layout)


def _dense(layout: GistLayout) -> Attention:
    """A mask that is added to the scores, made once: torch turns a boolean one into that on every call."""
    dtype = torch.float32 if layout.device.type == "cpu" else torch.bfloat16
    mask = torch.zeros(layout.num_rows, layout.num_rows, dtype=dtype, device=layout.device)
    mask.masked_fill_(~layout.token_mask()[0], -torch.inf)
    return lambda q, k, v: _masked(q, k, v, mask[None, None])


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """SDPA under a mask. On a GPU only its slowest kernel takes one with fewer key heads than query heads."""
    if q.is_cuda and mask is not None:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _dense_fits(layout: GistLayout, heads: int) -> str:
    # token_mask counts hits in int32 while it is made
    return _fits(4 * layout.num_rows**2, "its mask", layout)


def _fits(size: int, what: str, layout: GistLayout) -> str:
    return f"{what} would take {size / 2**30:.1f} GiB" if size > largest(layout.device) else ""


def _per_segment(layout: GistLayout) -> Attention:
    """One call per segment over the gists that it sees and its own rows; the masks are small."""
    runs = runs_of(layout)
    gather = layout.gather[0]
    masks = [None if run.rows == 1 else _corner(run, layout.device) for run in runs]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        gist_k, gist_v = k[:, :, gather], v[:, :, gather]
        out = []
        for run, mask in zip(runs, masks, strict=True):
            keys, values = (
                torch.cat([gist[:, :, run.gist_begin : run.gist_end], local[:, :, run.local_begin : run.end]], 2)
                for gist, local in ((gist_k, k), (gist_v, v))
            )
            rows = q[:, :, run.begin : run.end]
            out.append(_masked(rows, keys, values, mask))
        return torch.cat(out, 2)

    return attend


def _corner(run: Run, device: torch.device) -> torch.Tensor:
    """Causal in the lower right corner: every row sees all keys but the later rows of its own run."""
    return torch.ones(run.rows, run.keys, dtype=torch.bool, device=device).tril(run.keys - run.rows)


def _moves(layout: GistLayout, heads: int) -> str:
    return "" if 16 * len(runs_of(layout)) <= layout.num_rows else "the local window moves with every row"


def _causal(layout: GistLayout) -> Attention:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def of_package(package: str) -> Callable[[GistLayout], Callable[..., torch.Tensor]]:
    """flash-attn by its package (`FLASH`), some versions of which also return the log-sum-exp."""

    def planned(layout: GistLayout) -> Callable[..., torch.Tensor]:
        varlen = importlib.import_module(package).flash_attn_varlen_func
        return flash_varlen(layout, lambda *tensors, **options: _first(varlen(*tensors, **options)))

    return planned


def flashinfer_ragged(layout: GistLayout) -> Callable[..., torch.Tensor]:
    """FlashInfer's prefill over ragged keys, planned for the layout's runs as the others are."""
    flashinfer = importlib.import_module("flashinfer")
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=layout.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
    shapes: list[tuple[int, ...]] = []

    def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        shape = q.shape[1], k.shape[1], q.shape[2]
        if shapes != [shape]:  # planned once, as for all layers
            starts = options["cu_seqlens_q"], options["cu_seqlens_k"]
            wrapper.plan(*starts, *shape, causal=True, q_data_type=q.dtype, kv_data_type=k.dtype)
            shapes[:] = [shape]
        return wrapper.run(q.contiguous(), k, v)

    return flash_varlen(layout, varlen)


def _first(found: Any) -> torch.Tensor:
    return found[0] if isinstance(found, tuple) else found


def flash_varlen(layout: GistLayout, varlen: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Attention by a function with the interface of ``flash_attn_varlen_func``."""
    runs, gather = runs_of(layout), layout.gather[0].cpu()
    pieces = [
        piece
        for run in runs
        for piece in (gather[run.gist_begin : run.gist_end], torch.arange(run.local_begin, run.end))
    ]
    index = torch.cat(pieces).to(layout.device)

    def starts(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int32, device=layout.device).cumsum(0, dtype=torch.int32)

    options = {
        "cu_seqlens_q": starts([run.rows for run in runs]),
        "cu_seqlens_k": starts([run.keys for run in runs]),
        "max_seqlen_q": max(run.rows for run in runs),
        "max_seqlen_k": max(run.keys for run in runs),
        "causal": True,
    }

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, keys, values = (t[0].transpose(0, 1) for t in (q, k, v))  # [N, H, D]
        return varlen(rows, keys[index], values[index], **options).transpose(0, 1)[None]

    return attend


def installed(package: str) -> bool:
    """Whether a package, or a part of one, is there to be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the package that it would be a part of
        return False


def lacks(package: str, moves: Callable[[GistLayout, int], str]) -> Callable[[GistLayout, int], str]:
    """Why a package cannot serve a layout."""

    def reason(layout: GistLayout, heads: int) -> str:
        if layout.device.type == "cpu":
            return f"{package} needs a GPU"
        if not installed(package):
            return f"{package} is not installed"
        return moves(layout, heads)

    return reason


OURS = Baseline("gistkern", _ours)
# what has flash_attn_varlen_func of each version
FLASH = {"flash-attn 2": "flash_attn", "flash-attn 3": "flash_attn_interface", "flash-attn 4": "flash_attn.cute"}
BASELINES = {
    "sdpa dense": Baseline("SDPA, dense mask", _dense, _dense_fits),
    "sdpa per segment": Baseline("SDPA per segment, gists gathered", _per_segment, _moves),
    "flex": Baseline("FlexAttention, compiled", flex.natural, flex.why_not_natural, flex.no_backward),
    "flex permuted": Baseline(
        "FlexAttention, compiled, keys as [gists, raw]", flex.permuted, flex.why_not, flex.no_backward
    ),
    "flex flash": Baseline(
        "FlexAttention, compiled, keys as [gists, raw], BACKEND=FLASH",
        lambda layout: flex.permuted(layout, {"BACKEND": "FLASH"}),
        lambda layout, heads: lacks("flash_attn.cute", flex.why_not)(layout, heads),
    ),
    "causal": Baseline("SDPA, causal: the mask ignored", _causal, masked=False),
    **{
        name: Baseline(f"{name} varlen, gists gathered", of_package(package), lacks(package, _moves))
        for name, package in FLASH.items()
    },
    "flash-attn 4 masked": Baseline(
        "flash-attn 4, keys as [gists, raw], mask_mod and lists of blocks",
        flash4.masked,
        lambda layout, heads: lacks(flash4.PACKAGE, flash4.why_not)(layout, heads),
    ),
    "flashinfer": Baseline(
        "FlashInfer, ragged, gists gathered",
        flashinfer_ragged,
        lacks("flashinfer", _moves),
        lambda layout: "FlashInfer has no backward",
    ),
}
