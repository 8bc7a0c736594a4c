"""Filling the compact rows: the past rows, then the rows of this call that the layout's gather list names.

``compact`` and ``compact_backward`` are the plain torch version that the CPU and reference backends use.
"""

from __future__ import annotations

import torch

__all__ = ["compact", "compact_backward", "dense_rows", "gather_rows"]


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its last dimension contiguous: kernels read whole rows of D, every other stride is free."""
    if tensor.stride(-1) == 1:
        return tensor
    if max(tensor.shape) >= 2**31:  # an expanded one, which no memory holds
        raise ValueError(f"a tensor must have fewer than 2^31 rows, got {tuple(tensor.shape)}")
    return tensor.contiguous()


def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``index`` (``[B, G]``, -1 for a filler that nobody sees) of ``[B, H, M, D]``; differentiable."""
    batch, heads = (torch.arange(size, device=rows.device) for size in rows.shape[:2])
    # indices of whole rows: torch.gather takes one for every element, and is 2 to 9 times slower on CPU
    return rows[batch[:, None, None], heads[None, :, None], index.clamp(min=0)[:, None]]


def compact(
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None,
    past_v: torch.Tensor | None,
    gather: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compact rows ``[B, Hkv, past + G, D]`` of keys and values.

    k, v ``[B, Hkv, M, D]``; past_k, past_v ``[B, Hkv, past, D]`` or None; gather int64 ``[B, G]``.
    """
    gathered = gather_rows(k, gather), gather_rows(v, gather)
    if past_k is None or past_v is None:
        return gathered
    return torch.cat([past_k, gathered[0]], 2), torch.cat([past_v, gathered[1]], 2)


def compact_backward(
    grad_gist_k: torch.Tensor, grad_gist_v: torch.Tensor, gather: torch.Tensor, num_local: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients ``[B, Hkv, num_local, D]`` of k and v from those of the gathered rows; repeated tokens add up."""
    gradients = []
    for grad in (grad_gist_k, grad_gist_v):
        # a filler's gradient is zero, since nobody sees it: adding it to row 0 changes nothing
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        total = wide.new_zeros((*grad.shape[:2], num_local, grad.shape[3]))
        gradients.append(total.scatter_add_(2, _expanded(gather.clamp(min=0), grad), wide).to(grad.dtype))
    return gradients[0], gradients[1]


def _expanded(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])
