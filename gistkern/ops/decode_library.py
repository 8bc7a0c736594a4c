"""The operators under `gistkern.ops.decode`: schemas, shape functions, and who computes them.

Backends that know pools and pages have `pool_decode` and `pool_compact`; the others get dense buffers (dense.py).
"""

from __future__ import annotations

import torch

from gistkern import backends
from gistkern.backends import dense
from gistkern.kernels.arguments import DecodeArguments, PoolWrite
from gistkern.ops import checks
from gistkern.ops.decode_checks import (
    check_apart,
    check_compact,
    check_compact_values,
    check_decode,
    check_decode_values,
)

__all__ = ["check_call", "compact", "decode"]

_library = torch.library.Library("gistkern", "FRAGMENT")
_library.define(
    "decode(Tensor q, Tensor gist_k, Tensor gist_v, Tensor? gist_k_scale, Tensor? gist_v_scale, Tensor gist_begin, "
    "Tensor gist_end, Tensor tail_k, Tensor tail_v, Tensor? tail_k_scale, Tensor? tail_v_scale, Tensor? tail_length, "
    "Tensor? local_begin, Tensor? page_table, SymInt gist_capacity, float scale, str backend) -> (Tensor, Tensor)"
)
_library.define(
    "compact_into(Tensor k, Tensor v, Tensor gather, Tensor slot, Tensor(a!) pool_k, Tensor(b!) pool_v, "
    "Tensor(c!)? pool_k_scale, Tensor(d!)? pool_v_scale, str backend) -> ()"
)


@torch.library.impl(_library, "decode", "CompositeExplicitAutograd")
def _decode(*inputs):
    *arguments, backend = inputs
    call = DecodeArguments(*arguments)
    module = backends.get(backend).load()
    if hasattr(module, "pool_decode"):
        return checks.call(module, "pool_decode", check_call, call)
    check_call(call)
    return dense.decode(module.forward, call)


def check_call(call: DecodeArguments) -> None:
    """Raise ValueError unless a call of the operator fits: its tensors, and their values where those are on the CPU."""
    vectors = call.gist_begin, call.gist_end, call.tail_length, call.local_begin, call.page_table
    check_decode(call.q, call.gist, call.tail, *vectors)
    checks.check_scale(call.scale)
    if not 0 <= call.gist_capacity < 2**31:
        raise ValueError(f"gist_capacity must lie in 0..2^31 - 1, got {call.gist_capacity}")
    for name in ("gist_begin", "gist_end", "local_begin"):
        vector = getattr(call, name)
        if vector is not None and vector.dim() != 2:
            raise ValueError(f"{name} must be [batch, rows], got {tuple(vector.shape)}")
    if call.q.device.type == "cpu":
        check_decode_values(call)


@torch.library.register_fake("gistkern::decode", lib=_library)
def _decode_fake(q, *arguments):
    checks.check_devices(q, *arguments)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.impl(_library, "compact_into", "CompositeExplicitAutograd")
def _compact(*inputs):
    *arguments, backend = inputs
    call = PoolWrite(*arguments)
    module = backends.get(backend).load()
    if hasattr(module, "pool_compact"):
        check_apart(call.pool)  # the kernel knows the first address only
        checks.call(module, "pool_compact", _check_compact, call)
    else:
        _check_compact(call)
        dense.compact(call)


def _check_compact(call: PoolWrite) -> None:
    check_compact(call.k, call.v, call.gather, call.slot, call.pool)
    if call.k.device.type == "cpu":
        check_compact_values(call.gather, call.slot, call.k.shape[2], len(call.pool_k))


@torch.library.register_fake("gistkern::compact_into", lib=_library)
def _compact_fake(k, *inputs):
    checks.check_devices(k, *inputs)


decode = torch.ops.gistkern.decode.default
compact = torch.ops.gistkern.compact_into.default
