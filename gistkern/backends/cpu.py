"""CPU backend: the extension's own kernels (csrc/cpu), fp32 inside, for AVX-512, AVX2 or any other processor."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gistkern.backends import native
from gistkern.backends.native import compact, compact_into, pool_compact, pool_decode, prepared_pool_decode
from gistkern.kernels.arguments import AttentionArguments
from gistkern.kernels.schedule import DECODE_ROWS
from gistkern.rows import compact_backward, dense_rows

__all__ = [
    "backward",
    "compact",
    "compact_backward",
    "compact_into",
    "folded_backward",
    "forward",
    "pool_compact",
    "pool_decode",
    "prepared_decode",
    "prepared_forward",
    "prepared_pool_decode",
]

# whose operators check by themselves that no call reaches outside a buffer
CHECKED = frozenset(
    {"forward", "backward", "folded_backward", "compact", "compact_into", "pool_decode", "pool_compact"}
)

# packed rows of one key/value head (query rows times the group) up to which vectors run over head_dim instead of over
# rows: with fewer rows than lanes most lanes would idle
_DECODE_PACKED_ROWS = 16


def forward(arguments: AttentionArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[B, Hq, N, D]`` and log-sum-exp ``[B, Hq, N]``."""
    arguments = arguments.readable()
    return native.decode_rows(arguments) if _decodes(arguments) else native.operators().cpu_attention(*arguments)


def prepared_decode(arguments: AttentionArguments) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """`native.prepared_decode` where the decode kernel serves."""
    return native.prepared_decode(arguments) if _decodes(arguments) else None


def prepared_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past_k: torch.Tensor | None,
    past_v: torch.Tensor | None,
    vectors: tuple[torch.Tensor, ...],
    scale: float,
) -> Callable[..., tuple[torch.Tensor, ...]] | None:
    """Compaction and `forward` in one function of tensors that lie as these; None where it is not for them.

    It takes q, k, v, the past rows or None, and buffers that have room behind those or None; it hands back output, LSE
    and compact rows. `vectors` are a layout's gist_begin, gist_end, local_begin and gather, contiguous.
    """
    begin, end, local, gather = vectors
    steps = [tensor.stride(-1) for tensor in (q, k, v, past_k, past_v) if tensor is not None]
    if q.shape[2] <= DECODE_ROWS or not gather.shape[1] or steps.count(1) != len(steps):
        return None
    past = 0 if past_k is None else past_k.shape[2]
    new, every = gather.shape[1], past + gather.shape[1]
    shape = (*k.shape[:2], every, k.shape[3])
    compact, attention = native.operators().compact.default, native.operators().cpu_attention.default

    def run(q, k, v, past_k, past_v, room=None):
        if room is None:
            gist_k, gist_v = k.new_empty(shape), v.new_empty(shape)
            compact(k, v, past_k, past_v, gather, None, gist_k, gist_v, None, None)
        else:
            key, value = room
            # `data`: as `native.compact_into`
            added = key.narrow(2, past, new).data, value.narrow(2, past, new).data
            compact(k, v, None, None, gather, None, *added, None, None)
            gist_k, gist_v = key.narrow(2, 0, every), value.narrow(2, 0, every)
        out, lse = attention(q, k, v, gist_k, gist_v, begin, end, local, scale)
        return out, lse, gist_k, gist_v

    return run


def backward(
    arguments: AttentionArguments, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v, gist_k and gist_v, bit-identical on any number of threads."""
    return _backward(arguments, None, grad_out, out, lse)


def folded_backward(
    arguments: AttentionArguments,
    gather: torch.Tensor,
    grad_out: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v and the past rows; those of the rows that `gather` lists are added into k's and v's.

    `gather` int64 ``[B, G - past]`` as `compact` takes it. Each element is summed in fp32 and rounded once, in an order
    that is the same on any number of threads; no full-size gradient of gathered rows is formed.
    """
    return _backward(arguments, gather, grad_out, out, lse)


def _backward(
    arguments: AttentionArguments,
    gather: torch.Tensor | None,
    grad_out: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    arguments = arguments.readable()
    saved = out.contiguous(), lse.contiguous()
    if _decodes(arguments):
        # probabilities are exp(score - lse): both must come from one order of summation (docs/concepts/numerics.md)
        again, sums = native.operators().cpu_attention(*arguments)
        # what the LSE holds beside the rows' scores: a learned sink, or 0
        sink = (lse - native.decode_rows(arguments)[1]).nan_to_num(0.0)
        saved = again.mul_((-sink).exp()[..., None]), sums + sink
    return native.operators().cpu_attention_backward(
        *(dense_rows(grad_out), *arguments.buffers, *saved, *arguments.intervals, arguments.scale, gather)
    )


def _decodes(arguments: AttentionArguments) -> bool:
    heads, rows = arguments.q.shape[1:3]
    return rows <= DECODE_ROWS and rows * (heads // arguments.k.shape[1]) <= _DECODE_PACKED_ROWS
