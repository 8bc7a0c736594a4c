"""The public op: what an eager call runs is planned once for a layout; torch.compile and its like see operators."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from gistkern import backends
from gistkern.kernels import configs
from gistkern.layout import GistLayout
from gistkern.layout.checks import check_once
from gistkern.ops import library
from gistkern.ops.checks import FIXED_SCALES, check_scale, refuse_forward_mode
from gistkern.ops.plan import Found, keep, kept, key_of, plan_for
from gistkern.ops.room import Room, check_room, has_room, room_key
from gistkern.ops.sinks import check_learned_sinks

__all__ = ["AttentionOptions", "attend", "gist_attention", "needs_operators"]

_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None)}


class AttentionOptions(NamedTuple):
    """What a layer's attention goes by beside its tensors and their layout, as `gist_attention` takes it."""

    scale: float | None = None
    backend: str = "auto"
    learned_sinks: torch.Tensor | None = None


def gist_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: GistLayout,
    *,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
    scale: float | None = None,
    learned_sinks: torch.Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which each row sees the two intervals of `layout` and nothing else.

    Parameters
    ----------
    q : Tensor
        ``[B, Hq, N, D]``, float16, bfloat16, float32 or float64.
    k, v : Tensor
        ``[B, Hkv, M, D]`` with ``M = layout.num_local``; Hq a multiple of Hkv (grouped-query attention,
        heads are never repeated in memory).
    layout : GistLayout
        On the same device.
    past_key, past_value : Tensor, optional
        ``[B, Hkv, layout.past, D]``: compact rows of earlier calls, before this call's own.
    scale : float, optional
        Of the scores, positive; ``D ** -0.5`` by default.
    learned_sinks : Tensor, optional
        ``[Hq]``, floats: for each head one logit that takes part in every row's softmax and carries no value, as
        gpt-oss has them (Agarwal et al. 2025). Differentiable (docs/concepts/numerics.md).
    backend : str
        ``"auto"`` or a name of `gistkern.backends.BACKENDS`. A named backend never falls back. On a GPU ``"auto"``
        hands layouts that hide nothing (`GistLayout.plain`) to torch's own attention, whose gradients may differ in
        the last bits from run to run; ``"triton"`` keeps to kernels that repeat themselves bit for bit, and so does
        ``torch.use_deterministic_algorithms(True)``.
    return_lse : bool
        Also return the log-sum-exp of each row's scores (its learned sink among them), ``[B, Hq, N]``, natural log, not
        differentiable.

    Returns
    -------
    Tensor or (Tensor, Tensor)
        Output like `q`, accumulated in at least fp32. Rows that see nothing (padding) are 0 with LSE -inf.

    Raises
    ------
    ValueError
        If tensors and layout do not fit each other, an interval or a gathered row leaves its buffer, the scale is no
        positive number that float32 holds, or the backend is unknown.
    RuntimeError
        If the backend cannot serve these tensors.

    Examples
    --------
    >>> layout = GistLayout.from_segments([6], gists=2, tail=3)
    >>> q, k = torch.randn(1, 4, 11, 16), torch.randn(1, 2, 11, 16)
    >>> gist_attention(q, k, k, layout).shape
    torch.Size([1, 4, 11, 16])
    """
    options = scale, backend, learned_sinks
    out, lse, _, _ = attend(
        q, k, v, layout, options, past_key=past_key, past_value=past_value, wants_lse=return_lse, wants_rows=False
    )
    if not return_lse:
        return out
    assert lse is not None  # wanted
    return out, lse


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: GistLayout,
    options: tuple[float | None, str, torch.Tensor | None],
    *,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
    room: Room | None = None,
    wants_lse: bool = False,
    wants_rows: bool = True,
) -> Found:
    """`gist_attention` that also hands back what it compacted.

    Parameters
    ----------
    options : tuple
        As `AttentionOptions`.
    room : (Tensor, Tensor), optional
        Contiguous buffers ``[B, Hkv, C, D]`` of keys and values whose first ``layout.past`` rows are `past_key` and
        `past_value`, with room behind them. Where no tensor learns and C suffices, the call's new rows are written
        there, into rows ``[past, G)``, and the compact rows handed back are views of the buffers. Where something
        learns, under operators (`needs_operators`, torch.compile), or where C is too small, they are copied into
        memory of their own as without `room`: whose memory they lie in tells which.

    Returns
    -------
    (Tensor, Tensor, Tensor, Tensor)
        Output, LSE, and the compact rows ``[B, Hkv, G, D]`` of keys and values that attention has read: what a cache
        stores. Those are `past_key` and `past_value` themselves where the call gathers none. What is not wanted may
        be None.
    """
    scale, backend, learned_sinks = options
    tensors = q, k, v, past_key, past_value, learned_sinks
    if torch.compiler.is_compiling() or needs_operators(tensors):
        return _by_operators(*tensors[:5], layout, options)
    if scale.__class__ not in FIXED_SCALES:
        scale = float(scale)  # type: ignore[arg-type]
    gradient = torch.is_grad_enabled() and _any_learns(*tensors)
    if room is not None and (gradient or not has_room(room, layout)):
        room = None
    whole, last, key = wants_lse or wants_rows, None, None
    asked: tuple[Any, ...] = ()
    try:
        of_room = None if room is None else room_key(room, past_key, past_value)
        of_sinks = None if learned_sinks is None else (learned_sinks.shape, learned_sinks.dtype, learned_sinks.device)
        asked = scale, backend, gradient, wants_lse, of_room, of_sinks, configs.changes
        last = layout.__dict__.get("_plan")
    except AttributeError:  # no tensors or no layout: refused by name
        asked = ()
    if last is not None and last.attend_again is not None:
        found = last.attend_again(*tensors, layout, asked, whole, room)
        if found is not None:
            return found
    if asked:
        try:
            key = key_of(*tensors[:5], layout, asked)
        except (AttributeError, ValueError, RuntimeError):  # nested and sparse tensors too
            key = None
    plan = None if key is None else kept(layout, key, last)
    if plan is not None and plan.backend == "torch" and backends.get("torch").refuses(q) is not None:
        plan = None  # the user has changed what torch may use since
    if plan is None:
        scale = _checked(tensors, layout, scale)
        if room is not None:
            check_room(room, k, past_key, past_value, layout)
        wanted = {"lse": wants_lse, "sinks": learned_sinks is not None, "in_room": room is not None}
        plan = plan_for(backend, tensors[:5], layout, scale, gradient, **wanted)
        assert key is not None
        keep(layout, key, plan)
    return plan.attend(*tensors, whole, room)


def needs_operators(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether somebody has to see `torch.library` operators in an eager call.

    Subclasses of tensors, dispatch modes, `torch.func`, tangents and `torch.jit.trace` look at operators. What they see
    are those of `gistkern.ops.library`; where nobody looks a plan is run.
    """
    q, k, v, past_key, past_value, learned_sinks = tensors
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or not (type(q) in _PLAIN and type(k) in _PLAIN and type(v) in _PLAIN)
        or not (type(past_key) in _PLAIN and type(past_value) in _PLAIN and type(learned_sinks) in _PLAIN)
    )


def _any_learns(q, k, v, past_key, past_value, learned_sinks) -> bool:
    # asked at every layer: no loop
    return bool(
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (past_key is not None and past_key.requires_grad)
        or (past_value is not None and past_value.requires_grad)
        or (learned_sinks is not None and learned_sinks.requires_grad)
    )


def _by_operators(q, k, v, past_key, past_value, layout: GistLayout, options: tuple[Any, ...]) -> Found:
    """Compaction and attention as two operators."""
    scale, backend, learned_sinks = options
    given = (q, k, v, past_key, past_value, learned_sinks)
    scale = _checked(given, layout, scale)
    gradient = torch.is_grad_enabled() and _any_learns(*given)
    name = backends.choose(backend, q, gradient)
    if layout.gather.shape[1] == 0 and past_key is not None and past_value is not None:
        gist_k, gist_v = past_key, past_value  # decoding: nothing new to gather, nothing to copy
    else:
        gist_k, gist_v = library.compact(k, v, past_key, past_value, layout.gather, name)
    vectors = layout.gist_begin, layout.gist_end, layout.local_begin
    out, lse = library.attention(q, k, v, gist_k, gist_v, *vectors, scale, name, learned_sinks)
    return out, lse, gist_k, gist_v


def _checked(tensors: tuple[Any, ...], layout: GistLayout, scale: float | None) -> float:
    """The scale, of tensors and a layout that fit each other."""
    q, k, v, past_key, past_value, learned_sinks = tensors
    _check_tensors(q, k, v, layout, past_key, past_value)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    check_scale(scale)
    check_learned_sinks(learned_sinks, q)
    check_once(layout)
    refuse_forward_mode(*tensors)
    return scale


def _check_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: GistLayout,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
) -> None:
    if not isinstance(layout, GistLayout):
        raise TypeError(f"layout must be a GistLayout, got {type(layout).__name__}")
    given = {"q": q, "k": k, "v": v}
    if past_key is not None and past_value is not None:
        given |= {"past_key": past_key, "past_value": past_value}
    for name, tensor in given.items():
        if not torch.is_tensor(tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_nested or tensor.layout is not torch.strided:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise ValueError(f"{name} must be a dense tensor, got a {kind} one: pad it, or use to_dense()")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, rows, head_dim], got {tuple(tensor.shape)}")
    batch, heads, rows, dim = q.shape
    kv_heads = k.shape[1]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"query heads ({heads}) must be a positive multiple of key/value heads ({kv_heads})")
    if batch == 0 or rows == 0:
        raise ValueError(f"q has {batch} samples of {rows} rows: there is nothing to attend")
    if dim == 0:
        raise ValueError("q has rows of 0 elements (head_dim 0): there is nothing to attend")
    if (batch, rows) != (layout.batch_size, layout.num_rows):
        raise ValueError(f"q has {batch} samples of {rows} rows, the layout {layout.batch_size} of {layout.num_rows}")
    expected = (batch, kv_heads, layout.num_local, dim)
    for name, tensor in (("k", k), ("v", v)):
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must be {expected} for this q and layout, got {tuple(tensor.shape)}")
    if (past_key is None) != (past_value is None):
        raise ValueError("past_key and past_value go together: pass both or neither")
    past_rows = 0 if past_key is None else past_key.shape[2]
    if past_rows != layout.past:
        raise ValueError(f"the layout expects {layout.past} past rows, past_key has {past_rows}")
    del given["q"]
    for name, tensor in given.items():
        if name.startswith("past") and tuple(tensor.shape) != (batch, kv_heads, past_rows, dim):
            raise ValueError(
                f"{name} must be {(batch, kv_heads, past_rows, dim)} to go with k, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, q {q.dtype} on {q.device}: make them equal")
    if layout.device != q.device:
        raise ValueError(f"the layout is on {layout.device}, q on {q.device}: use layout.to({str(q.device)!r})")
