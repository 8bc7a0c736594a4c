"""What a user would run instead of gistkern's attention: each the best way we know to write it.

A baseline plans once, outside the clock, whatever depends on the layout alone (masks, indices, block masks), as one
would for all layers of a model. Its answer on the same inputs must be ours, except where it ignores the mask on
purpose. Layouts of one batch row only; packed documents are one row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.measured import flash_varlen, flex
from bench.measured.flash_varlen import Run, runs_of
from bench.measured.limits import largest
from gistkern import GistLayout, gist_attention

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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


def _eager(layout: GistLayout) -> Attention:
    """transformers' own `eager` attention, with the mask that its masking functions would make."""
    from types import SimpleNamespace

    from transformers.models.llama.modeling_llama import eager_attention_forward

    dtype = torch.float32 if layout.device.type == "cpu" else torch.bfloat16
    mask = torch.zeros(1, 1, layout.num_rows, layout.num_rows, dtype=dtype, device=layout.device)
    mask.masked_fill_(~layout.token_mask()[:, None], torch.finfo(dtype).min)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
        return eager_attention_forward(module, q, k, v, mask, q.shape[-1] ** -0.5)[0].transpose(1, 2)

    return attend


def _eager_fits(layout: GistLayout, heads: int) -> str:
    return _fits(4 * heads * layout.num_rows**2, "its scores", layout)


OURS = Baseline("gistkern", _ours)
BASELINES = {
    "sdpa dense": Baseline("SDPA, dense mask", _dense, _dense_fits),
    "sdpa per segment": Baseline("SDPA per segment, gists gathered", _per_segment, _moves),
    "flex": Baseline("FlexAttention, compiled", flex.natural, flex.why_not_natural, flex.no_backward),
    "flex permuted": Baseline(
        "FlexAttention, compiled, keys as [gists, raw]", flex.permuted, flex.why_not, flex.no_backward
    ),
    "causal": Baseline("SDPA, causal: the mask ignored", _causal, masked=False),
    "eager": Baseline("transformers, eager", _eager, _eager_fits),
    "flash-attn 2": Baseline(
        "flash-attn 2 varlen, gists gathered", flash_varlen.second, flash_varlen.why_not("flash_attn", _moves)
    ),
    "flash-attn 3": Baseline(
        "flash-attn 3 varlen, gists gathered", flash_varlen.third, flash_varlen.why_not("flash_attn_interface", _moves)
    ),
}
