"""The specification: gist-masked attention, dense, in the precision of its inputs (use fp64 or fp32).

Imported by tests and by the backend table's `reference` row; no optimized code imports it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gistkern.kernels.arguments import AttentionArguments
from gistkern.layout import GistLayout
from gistkern.layout.checks import check_now
from gistkern.rows import compact, compact_backward, compact_into

__all__ = [
    "backward",
    "compact",
    "compact_backward",
    "compact_into",
    "dense_mask",
    "dense_scores",
    "forward",
    "from_layout",
]


def dense_mask(intervals: Sequence[torch.Tensor], num_compact: int, num_local: int) -> torch.Tensor:
    """bool ``[B, N, G + M]`` of docs/concepts/mask.md, from gist_begin, gist_end and local_begin alone."""
    gist_begin, gist_end, local_begin = intervals
    rows = gist_begin.shape[1]
    row = torch.arange(num_local - rows, num_local, device=gist_begin.device)[:, None]
    compact = torch.arange(num_compact, device=gist_begin.device)
    local = torch.arange(num_local, device=gist_begin.device)
    sees_gist = (gist_begin[..., None] <= compact) & (compact < gist_end[..., None])
    sees_local = (local_begin[..., None] <= local) & (local <= row)
    return torch.cat([sees_gist, sees_local], dim=-1)


def dense_scores(
    q: torch.Tensor, k: torch.Tensor, gist_k: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked scores ``[B, Hq, N, G + M]`` (-inf where unseen) and all keys ``[B, Hq, G + M, D]``."""
    keys = torch.cat([gist_k, k], dim=2).repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = torch.einsum("bhnd,bhmd->bhnm", q, keys) * scale
    return scores.masked_fill(~mask[:, None], -torch.inf), keys


def forward(
    arguments: AttentionArguments, learned_sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(scale * q K^T) V`` over the rows each query sees, and the log-sum-exp of its scores.

    Shapes as `gistkern.ops.library`. A row that sees nothing gives 0 and -inf. Differentiable by autograd.
    `learned_sinks` (``[Hq]``) are one more column of scores, whose probability is dropped.
    """
    q, k, v, gist_k, gist_v, *intervals, scale = arguments
    mask = dense_mask(intervals, gist_k.shape[2], k.shape[2])
    scores, _ = dense_scores(q, k, gist_k, mask, scale)
    columns = scores
    if learned_sinks is not None:
        column = learned_sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        columns = torch.cat([scores, column.masked_fill(~mask.any(-1)[:, None, :, None], -torch.inf)], dim=-1)
    lse = torch.logsumexp(columns, dim=-1)
    # an empty row has lse -inf; exp(-inf - -inf) would be NaN, in the gradient too
    safe_lse = lse.masked_fill(lse == -torch.inf, 0.0)
    probabilities = torch.exp(scores - safe_lse[..., None])
    values = torch.cat([gist_v, v], dim=2).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return torch.einsum("bhnm,bhmd->bhnd", probabilities, values).contiguous(), lse


def backward(
    arguments: AttentionArguments, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, gist_k, gist_v, written out (Dao et al. 2022, "FlashAttention", appendix B.2)."""
    q, k, v, gist_k, gist_v, *intervals, scale = arguments
    compact, kv_heads = gist_k.shape[2], k.shape[1]
    mask = dense_mask(intervals, compact, k.shape[2])
    scores, keys = dense_scores(q, k, gist_k, mask, scale)
    probabilities = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    values = torch.cat([gist_v, v], dim=2).repeat_interleave(q.shape[1] // kv_heads, dim=1)
    delta = (grad_out * out).sum(-1, keepdim=True)
    grad_scores = probabilities * (torch.einsum("bhnd,bhmd->bhnm", grad_out, values) - delta) * scale
    grad_q = torch.einsum("bhnm,bhmd->bhnd", grad_scores, keys)

    def to_kv_heads(gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        summed = gradient.unflatten(1, (kv_heads, -1)).sum(2)
        return summed[:, :, :compact], summed[:, :, compact:]

    grad_gist_k, grad_k = to_kv_heads(torch.einsum("bhnm,bhnd->bhmd", grad_scores, q))
    grad_gist_v, grad_v = to_kv_heads(torch.einsum("bhnm,bhnd->bhmd", probabilities, grad_out))
    return tuple(g.contiguous() for g in (grad_q, grad_k, grad_v, grad_gist_k, grad_gist_v))


def from_layout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: GistLayout,
    scale: float | None = None,
    past=None,
    learned_sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` of a layout: gathers the compact rows itself. `past` is an optional (key, value) pair."""
    check_now(layout)
    index = layout.gather.clamp(min=0)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    gist_k, gist_v = (t.gather(2, index) for t in (k, v))
    if past is not None:
        gist_k, gist_v = torch.cat([past[0], gist_k], 2), torch.cat([past[1], gist_v], 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    intervals = layout.gist_begin, layout.gist_end, layout.local_begin
    return forward(AttentionArguments(q, k, v, gist_k, gist_v, *intervals, scale), learned_sinks)
