"""The op under `gistkern.gist_attention`: schemas, shape functions, autograd. Kernels load on first use.

``attention`` takes (docs/concepts/mask.md for the intervals)

- q ``[B, Hq, N, D]``; k, v ``[B, Hkv, M, D]`` with M >= N, query row i being local row ``M - N + i``;
- gist_k, gist_v ``[B, Hkv, G, D]``: the compact rows;
- gist_begin, gist_end, local_begin: int32 ``[B, N]``;
- scale, and the name of a row of the backend table;
- learned_sinks ``[Hq]``, optional (sinks.py);

and returns out ``[B, Hq, N, D]`` and the natural-log LSE ``[B, Hq, N]`` in fp32 (fp64 for fp64 inputs),
0 and -inf on rows that see nothing. The LSE is not differentiable. ``attention_backward`` takes both as they came out.

``compact`` takes k, v, optional past rows ``[B, Hkv, past, D]``, the gather list int64 ``[B, G - past]`` and the
name of a backend, and returns gist_k and gist_v.

Calls that no kernel may see (checks.py) raise ValueError when they run, eager or compiled.
"""

from __future__ import annotations

import torch

from gistkern import backends
from gistkern.kernels.arguments import AttentionArguments
from gistkern.ops import checks
from gistkern.ops.sinks import check_learned_sinks, gradient_of_sinks, with_learned_sinks

__all__ = ["attention", "attention_backward", "compact", "compact_backward"]

_ROWS = "Tensor gist_begin, Tensor gist_end, Tensor local_begin, float scale, str backend"
_KEYS = "Tensor k, Tensor v, Tensor gist_k, Tensor gist_v"

_library = torch.library.Library("gistkern", "DEF")
_library.define(f"attention(Tensor q, {_KEYS}, {_ROWS}, Tensor? learned_sinks=None) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor grad_out, Tensor q, {_KEYS}, Tensor out, Tensor lse, {_ROWS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "compact(Tensor k, Tensor v, Tensor? past_k, Tensor? past_v, Tensor gather, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "compact_backward(Tensor grad_gist_k, Tensor grad_gist_v, Tensor gather, SymInt num_local, str backend) "
    "-> (Tensor, Tensor)"
)


@torch.library.impl(_library, "attention", "CompositeExplicitAutograd")
def _attention(q, k, v, gist_k, gist_v, gist_begin, gist_end, local_begin, scale, backend, learned_sinks=None):
    arguments = AttentionArguments(q, k, v, gist_k, gist_v, gist_begin, gist_end, local_begin, scale)
    out, lse = checks.call(backends.get(backend).load(), "forward", checks.check_attention, arguments)
    check_learned_sinks(learned_sinks, q)
    return with_learned_sinks(out, lse, learned_sinks)


@torch.library.impl(_library, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(*inputs):
    grad_out, *buffers, out, lse, gist_begin, gist_end, local_begin, scale, backend = inputs
    arguments = AttentionArguments(*buffers, gist_begin, gist_end, local_begin, scale)
    module = backends.get(backend).load()
    return checks.call(module, "backward", checks.check_backward, arguments, grad_out, out, lse)


@torch.library.register_fake("gistkern::attention", lib=_library)
def _attention_fake(q, *inputs):
    checks.check_devices(q, *inputs)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.register_fake("gistkern::attention_backward", lib=_library)
def _attention_backward_fake(grad_out, *inputs):
    checks.check_devices(grad_out, *inputs)
    return tuple(t.new_empty(t.shape) for t in inputs[:5])


def _setup_context(ctx, inputs, output):
    *tensors, scale, backend, learned_sinks = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse, learned_sinks)
    ctx.scale, ctx.backend = scale, backend


def _differentiate(ctx, grad_out, grad_lse):
    *tensors, out, lse, learned_sinks = ctx.saved_tensors
    gradients = attention_backward(grad_out, *tensors[:5], out, lse, *tensors[5:], ctx.scale, ctx.backend)
    grad_sinks = gradient_of_sinks(grad_out, out, lse, learned_sinks) if ctx.needs_input_grad[-1] else None
    return (*gradients, None, None, None, None, None, grad_sinks)


torch.library.register_autograd("gistkern::attention", _differentiate, setup_context=_setup_context, lib=_library)


torch.library.register_autograd("gistkern::attention_backward", checks.refuse_second_derivative, lib=_library)


@torch.library.impl(_library, "compact", "CompositeExplicitAutograd")
def _compact(k, v, past_k, past_v, gather, backend):
    arguments = (k, v, past_k, past_v, gather)
    return checks.call(backends.get(backend).load(), "compact", checks.check_compact, *arguments)


@torch.library.impl(_library, "compact_backward", "CompositeExplicitAutograd")
def _compact_backward(grad_gist_k, grad_gist_v, gather, num_local, backend):
    arguments = (grad_gist_k, grad_gist_v, gather, num_local)
    return checks.call(backends.get(backend).load(), "compact_backward", checks.check_compact_backward, *arguments)


@torch.library.register_fake("gistkern::compact", lib=_library)
def _compact_fake(k, v, past_k, past_v, gather, backend):
    checks.check_devices(k, v, past_k, past_v, gather)
    past = 0 if past_k is None else past_k.shape[2]
    shape = (*k.shape[:2], past + gather.shape[1], k.shape[3])
    return k.new_empty(shape), v.new_empty(shape)


@torch.library.register_fake("gistkern::compact_backward", lib=_library)
def _compact_backward_fake(grad_gist_k, grad_gist_v, gather, num_local, backend):
    checks.check_devices(grad_gist_k, grad_gist_v, gather)
    shape = (*grad_gist_k.shape[:2], num_local, grad_gist_k.shape[3])
    return grad_gist_k.new_empty(shape), grad_gist_v.new_empty(shape)


def _setup_compact_context(ctx, inputs, output):
    k, _, past_k, _, gather, backend = inputs
    ctx.save_for_backward(gather)
    ctx.num_local, ctx.backend = k.shape[2], backend
    ctx.past = None if past_k is None else past_k.shape[2]


def _differentiate_compact(ctx, grad_gist_k, grad_gist_v):
    (gather,) = ctx.saved_tensors
    past = ctx.past or 0
    gathered = (grad[:, :, past:] for grad in (grad_gist_k, grad_gist_v))
    grad_k, grad_v = compact_backward(*gathered, gather, ctx.num_local, ctx.backend)
    # copies, not views: the caller may add into a gradient in place
    past_grads = (None, None) if ctx.past is None else (g[:, :, :past].clone() for g in (grad_gist_k, grad_gist_v))
    return (grad_k, grad_v, *past_grads, None, None)


torch.library.register_autograd(
    "gistkern::compact", _differentiate_compact, setup_context=_setup_compact_context, lib=_library
)


def _setup_compact_backward_context(ctx, inputs, output):
    _, _, gather, _, backend = inputs
    ctx.save_for_backward(gather)
    ctx.backend = backend


def _differentiate_compact_backward(ctx, grad_k, grad_v):
    (gather,) = ctx.saved_tensors  # linear, so its derivative is the gather itself
    return (*compact(grad_k, grad_v, None, None, gather, ctx.backend), None, None, None)


torch.library.register_autograd(
    "gistkern::compact_backward",
    _differentiate_compact_backward,
    setup_context=_setup_compact_backward_context,
    lib=_library,
)

attention = torch.ops.gistkern.attention.default
attention_backward = torch.ops.gistkern.attention_backward.default
compact = torch.ops.gistkern.compact.default
compact_backward = torch.ops.gistkern.compact_backward.default
