"""Decoding over a pool of gist rows that sequences share, and a paged tail: what a serving loop calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gistkern import backends
from gistkern.kernels.arguments import DecodeArguments
from gistkern.ops import decode_library
from gistkern.ops.attention import needs_operators
from gistkern.ops.checks import FIXED_SCALES, check_scale
from gistkern.ops.decode_checks import check_compact, check_decode, per_row, refuse_gradients
from gistkern.ops.sinks import check_learned_sinks, with_learned_sinks
from gistkern.rows import KeyValueRows

__all__ = ["Decodes", "Seen", "gist_compact", "gist_decode"]


def gist_decode(
    q: torch.Tensor,
    gist: KeyValueRows,
    tail: KeyValueRows,
    *,
    gist_begin: torch.Tensor,
    gist_end: torch.Tensor,
    tail_length: torch.Tensor | None = None,
    local_begin: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    gist_capacity: int | None = None,
    scale: float | None = None,
    learned_sinks: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of up to 8 new rows per sequence over a range of a shared pool and over the sequence's own tail.

    Query row i of sequence b sees pool rows ``[gist_begin, gist_end)`` and tail rows
    ``[local_begin, tail_length - N + i]``. Sequences whose ranges coincide share a document's rows. No value is read
    back from the device, so a CUDA graph can replay the call.

    Parameters
    ----------
    q : Tensor
        ``[B, Hq, N, D]`` with N <= 8; float16, bfloat16 or float32.
    gist : KeyValueRows
        The pool, ``[R, Hkv, D]``.
    tail : KeyValueRows
        ``[B, Hkv, M, D]``, or with `page_table` pages ``[P, page_size, Hkv, D]``. The new rows stand in it already.
    gist_begin, gist_end : Tensor
        int32 ``[B]``, or ``[B, N]`` where query rows differ.
    tail_length : Tensor, optional
        int32 ``[B]``: tail rows of each sequence, its N new ones included; all M (or all pages) by default.
    local_begin : Tensor, optional
        int32 ``[B]`` or ``[B, N]``: first tail row that is seen; 0 by default.
    page_table : Tensor, optional
        int32 ``[B, pages]``: tail row r of sequence b is row ``r % page_size`` of page
        ``page_table[b, r // page_size]``.
    gist_capacity : int, optional
        A bound on the pool rows that one sequence sees, from its first `gist_begin` to its last `gist_end`; all R rows
        by default. It chooses the launch (and, where no kernel reads the pool in place, sizes a gathered copy): a tight
        one is faster. One that is too small is an error, on a GPU one that cannot be seen without waiting for it.
    scale : float, optional
        Of the scores; ``D ** -0.5`` by default.
    learned_sinks : Tensor, optional
        ``[Hq]``, as `gist_attention`. Of partial results that are merged, one takes them.
    backend : str
        ``"auto"`` or a name of `gistkern.backends.BACKENDS`.

    Returns
    -------
    (Tensor, Tensor)
        Output like `q` and the natural-log LSE ``[B, Hq, N]`` in fp32, so that partial results merge
        (docs/concepts/numerics.md). Rows that see nothing are 0 with LSE -inf.

    Raises
    ------
    ValueError
        If the tensors do not fit each other; on the CPU also if a row, length or page is none of its buffer's.
    RuntimeError
        If the backend cannot serve them.

    Examples
    --------
    >>> pool = KeyValueRows(*torch.randn(2, 30, 2, 16))
    >>> tail = KeyValueRows(*torch.randn(2, 3, 2, 5, 16))
    >>> begin, end = torch.tensor([[0, 0, 20], [20, 20, 30]], dtype=torch.int32)  # two sequences share a document
    >>> out, lse = gist_decode(torch.randn(3, 4, 1, 16), pool, tail, gist_begin=begin, gist_end=end)
    >>> out.shape, lse.shape
    (torch.Size([3, 4, 1, 16]), torch.Size([3, 4, 1]))
    """
    tensors = q, gist, tail, gist_begin, gist_end, tail_length, local_begin, page_table
    return _run(_checked(tensors, gist_capacity, scale, learned_sinks, backend), tensors, learned_sinks)


class Seen(NamedTuple):
    """What the query rows of a call see, for all layers that see the same.

    Parameters
    ----------
    begin, end : Tensor
        int32 ``[B, N]``, contiguous: rows of the pool.
    length : Tensor or None
        int32 ``[B]``, contiguous: rows of the tail; None for all.
    local : Tensor or None
        int32 ``[B, N]``, contiguous: the first row of the tail; None for 0.
    kind : tuple
        All that checks look at, but for values: kernels see those, on a GPU nobody.
    """

    begin: torch.Tensor
    end: torch.Tensor
    length: torch.Tensor | None
    local: torch.Tensor | None
    kind: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        rows: int,
        begin: torch.Tensor,
        end: torch.Tensor,
        length: torch.Tensor | None,
        local: torch.Tensor | None,
    ) -> Seen:
        """Of `rows` query rows a sequence; intervals may be those of `gist_decode`, one for all rows among them."""
        begin, end = per_row(begin, rows).contiguous(), per_row(end, rows).contiguous()
        length = None if length is None else length.contiguous()
        local = None if local is None else per_row(local, rows).contiguous()
        vectors = begin, end, length, local
        return cls(*vectors, tuple([None if one is None else (one.shape, one.dtype, one.device) for one in vectors]))


class Decodes:
    """`gist_decode` for the layers of a model, step by step: calls that are alike are checked once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], _Prepared] = {}
        self._last: tuple[Any, ...] | None = None  # the key of the call before, and what is known of it
        self._prepared: _Prepared | None = None

    def decode(
        self,
        q: torch.Tensor,
        gist: KeyValueRows,
        tail: tuple[torch.Tensor, torch.Tensor],
        seen: Seen,
        capacity: int,
        options: tuple[float | None, str, torch.Tensor | None],
    ) -> torch.Tensor:
        """Output of `gist_decode` over a tail of floats; `options` are its scale, backend and learned sinks."""
        # every line is run by every layer of every decode step: nothing is called that an attribute answers
        scale, backend, sinks = options
        pool, pool_values, (own, own_values) = gist.key, gist.value, tail
        learns = q.requires_grad or pool.requires_grad or own.requires_grad or own_values.requires_grad
        learns = learns or (sinks is not None and sinks.requires_grad and torch.is_grad_enabled())
        if learns or torch.compiler.is_compiling() or needs_operators((q, own, own_values, pool, pool_values, sinks)):
            tensors = (q, gist, KeyValueRows(own, own_values), *seen[:4], None)
            return _run(_checked(tensors, capacity, scale, sinks, backend), tensors, sinks)[0]
        if scale.__class__ not in FIXED_SCALES:
            scale = float(scale)  # type: ignore[arg-type]
        room = own.shape[2]  # of a tail that grows from step to step
        key = (
            *(q.shape, q.stride(), q.dtype, q.device, pool.shape, pool.stride(), pool.dtype, pool.device),
            *(pool_values.stride(), own.shape[:2], own.shape[3:], own.stride(), own.dtype, own.device),
            *(own_values.stride(), own_values.shape == own.shape, q.shape[2] <= room < 2**31, seen.kind),
            *(capacity, scale, backend, None if sinks is None else (sinks.shape, sinks.dtype, sinks.device)),
        )
        prepared = self._prepared
        if prepared is None or key != self._last:
            prepared = self._known.get(key)
            if prepared is None:
                prepared = self._known[key] = _prepared(q, gist, tail, seen, capacity, (scale, backend, sinks))
            self._last, self._prepared = key, prepared
        if prepared.run is None:
            tensors = (q, gist, KeyValueRows(own, own_values), *seen[:4], None)
            return _run(prepared.checked, tensors, sinks)[0]
        try:
            out, lse = prepared.run(q, gist, own, own_values, *seen[:4])
        except Exception:
            decode_library.check_call(_arguments(prepared.checked, q, gist, tail, seen))
            raise
        return out if sinks is None else with_learned_sinks(out, lse, sinks)[0]


class _Checked(NamedTuple):
    """What is found out about a call: a bound on the pool's rows, the scale, the backend that serves it."""

    capacity: int
    scale: float
    backend: str


class _Prepared(NamedTuple):
    """What is known of calls of one kind, and the function of a backend that serves them without operators."""

    checked: _Checked
    run: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None


def _prepared(
    q: torch.Tensor,
    gist: KeyValueRows,
    tail: tuple[torch.Tensor, torch.Tensor],
    seen: Seen,
    capacity: int,
    options: tuple[float | None, str, torch.Tensor | None],
) -> _Prepared:
    scale, backend, sinks = options
    checked = _checked((q, gist, KeyValueRows(*tail), *seen[:4], None), capacity, scale, sinks, backend)
    prepare = getattr(backends.get(checked.backend).load(), "prepared_pool_decode", None)
    return _Prepared(checked, None if prepare is None else prepare(_arguments(checked, q, gist, tail, seen)))


def _arguments(
    checked: _Checked,
    q: torch.Tensor,
    gist: KeyValueRows,
    tail: tuple[torch.Tensor, torch.Tensor],
    seen: Seen,
) -> DecodeArguments:
    rows = gist.key, gist.value, gist.key_scale, gist.value_scale
    own = *tail, None, None, seen.length, seen.local, None
    return DecodeArguments(q, *rows, seen.begin, seen.end, *own, checked.capacity, checked.scale)


def _checked(
    tensors: tuple[Any, ...],
    capacity: int | None,
    scale: float | None,
    learned_sinks: torch.Tensor | None,
    backend: str,
) -> _Checked:
    q, gist, tail, *vectors = tensors
    check_decode(q, gist, tail, *vectors)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    check_scale(scale)
    capacity = gist.key.shape[0] if capacity is None else capacity
    if not isinstance(capacity, (int, torch.SymInt)) or isinstance(capacity, bool) or capacity < 0:
        raise ValueError(f"gist_capacity must not be negative, and an int, got {capacity!r}")
    check_learned_sinks(learned_sinks, q)
    if learned_sinks is not None:
        refuse_gradients("gist_decode", learned_sinks)
    return _Checked(min(capacity, gist.key.shape[0]), scale, backends.choose(backend, q))


def _run(
    checked: _Checked, tensors: tuple[Any, ...], learned_sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    q, gist, tail, begin, end, length, local, pages = tensors
    begin, end = per_row(begin, q.shape[2]), per_row(end, q.shape[2])
    out, lse = decode_library.decode(
        *(q, gist.key, gist.value, gist.key_scale, gist.value_scale, begin, end),
        *(tail.key, tail.value, tail.key_scale, tail.value_scale),
        *(length, None if local is None else per_row(local, q.shape[2]), pages, *checked),
    )
    return with_learned_sinks(out, lse, learned_sinks)


def gist_compact(
    k: torch.Tensor,
    v: torch.Tensor,
    gather: torch.Tensor,
    slot: torch.Tensor,
    pool: KeyValueRows,
    *,
    backend: str = "auto",
) -> None:
    """Write gist rows of one layer into a pool, quantizing them if the pool is quantized. In place, one launch.

    Parameters
    ----------
    k, v : Tensor
        ``[B, Hkv, M, D]``, the layer's keys and values, whatever was applied to them before included.
    gather : Tensor
        int64 ``[B, G]``: local rows to take (`GistLayout.gather`); -1 where there is none.
    slot : Tensor
        int64 ``[B, G]``: the pool row each goes to, all different; -1 to leave one out.
    pool : KeyValueRows
        ``[R, Hkv, D]``, of the type of `k`, int8 or float8_e4m3fn.

    Raises
    ------
    ValueError
        If the tensors do not fit each other; on the CPU also if a row is none of its buffer's or is written twice.
    RuntimeError
        If the backend cannot serve them.

    Examples
    --------
    >>> k, v = torch.randn(2, 1, 2, 9, 16)
    >>> pool = KeyValueRows.empty(10, kv_heads=2, head_dim=16, dtype=torch.float32)
    >>> gist_compact(k, v, torch.tensor([[7, 8]]), torch.tensor([[3, 4]]), pool)
    >>> torch.equal(pool.key[3], k[0, :, 7])
    True
    """
    check_compact(k, v, gather, slot, pool)
    name = backends.choose(backend, k[:, :, :1])  # a kernel for decoding serves: rows are copied, none attend
    decode_library.compact(k, v, gather, slot, pool.key, pool.value, pool.key_scale, pool.value_scale, name)
