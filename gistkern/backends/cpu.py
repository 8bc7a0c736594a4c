"""CPU backend: the extension's own kernels (csrc/cpu), fp32 inside, for AVX-512, AVX2 or any other processor."""

from __future__ import annotations

import torch

from gistkern.backends import native
from gistkern.backends.native import pool_compact, pool_decode
from gistkern.kernels.schedule import DECODE_ROWS
from gistkern.rows import compact, compact_backward, dense_rows

__all__ = ["backward", "compact", "compact_backward", "forward", "pool_compact", "pool_decode"]

# whose operators check by themselves that no call reaches outside a buffer
CHECKED = frozenset({"forward", "backward", "pool_decode", "pool_compact"})

# packed rows of one key/value head (query rows times the group) up to which vectors run over head_dim instead of over
# rows: with fewer rows than lanes most lanes would idle
_DECODE_PACKED_ROWS = 16


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gist_k: torch.Tensor,
    gist_v: torch.Tensor,
    gist_begin: torch.Tensor,
    gist_end: torch.Tensor,
    local_begin: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, Hq, N, D]`` and log-sum-exp ``[B, Hq, N]``; arguments as `gistkern.ops.library`."""
    q, k, v, gist_k, gist_v = (dense_rows(t) for t in (q, k, v, gist_k, gist_v))
    gist_begin, gist_end, local_begin = (t.contiguous() for t in (gist_begin, gist_end, local_begin))
    compute = native.decode_rows if _decodes(q, k) else native.operators().cpu_attention
    return compute(q, k, v, gist_k, gist_v, gist_begin, gist_end, local_begin, scale)


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gist_k: torch.Tensor,
    gist_v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    gist_begin: torch.Tensor,
    gist_end: torch.Tensor,
    local_begin: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, gist_k and gist_v, bit-identical on any number of threads."""
    tensors = [dense_rows(t) for t in (grad_out, q, k, v, gist_k, gist_v)]
    vectors = [t.contiguous() for t in (gist_begin, gist_end, local_begin)]
    saved = out.contiguous(), lse.contiguous()
    if _decodes(q, k):
        # probabilities are exp(score - lse): both must come from the same order of summation (docs/numerics.md)
        saved = native.operators().cpu_attention(*tensors[1:], *vectors, scale)
    return native.operators().cpu_attention_backward(*tensors, *saved, *vectors, scale)


def _decodes(q: torch.Tensor, k: torch.Tensor) -> bool:
    rows = q.shape[2]
    return rows <= DECODE_ROWS and rows * (q.shape[1] // k.shape[1]) <= _DECODE_PACKED_ROWS
