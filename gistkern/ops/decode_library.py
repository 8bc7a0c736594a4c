"""The operators under `gistkern.ops.decode`: schemas, shape functions, and who computes them.

Backends that know pools and pages have `pool_decode` and `pool_compact`; the others get dense buffers (dense.py).
"""

from __future__ import annotations

import torch

from gistkern import backends
from gistkern.backends import dense
from gistkern.ops import checks
from gistkern.ops.decode_checks import (
    check_apart,
    check_compact,
    check_compact_values,
    check_decode,
    check_decode_values,
)
from gistkern.rows import KeyValueRows

__all__ = ["compact", "decode"]

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
def _decode(q, *arguments):
    *rest, backend = arguments
    module = backends.get(backend).load()
    if hasattr(module, "pool_decode"):
        return checks.call(module, "pool_decode", _check_decode, q, *rest)
    _check_decode(q, *rest)
    return dense.decode(module.forward, q, *rest)


def _check_decode(
    q, k, v, k_scale, v_scale, begin, end, tail_k, tail_v, tail_k_scale, tail_v_scale, length, local, pages, *sizes
):
    capacity, scale = sizes
    gist, tail = KeyValueRows(k, v, k_scale, v_scale), KeyValueRows(tail_k, tail_v, tail_k_scale, tail_v_scale)
    check_decode(q, gist, tail, begin, end, length, local, pages)
    checks.check_scale(scale)
    if not 0 <= capacity < 2**31:
        raise ValueError(f"gist_capacity must lie in 0..2^31 - 1, got {capacity}")
    for name, vector in (("gist_begin", begin), ("gist_end", end), ("local_begin", local)):
        if vector is not None and vector.dim() != 2:
            raise ValueError(f"{name} must be [batch, rows], got {tuple(vector.shape)}")
    if q.device.type == "cpu":
        check_decode_values(gist, tail, begin, end, length, local, pages, capacity)


@torch.library.register_fake("gistkern::decode", lib=_library)
def _decode_fake(q, *arguments):
    checks.check_devices(q, *arguments)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.impl(_library, "compact_into", "CompositeExplicitAutograd")
def _compact(k, v, gather, slot, pool_k, pool_v, pool_k_scale, pool_v_scale, backend):
    module = backends.get(backend).load()
    arguments = (k, v, gather, slot, pool_k, pool_v, pool_k_scale, pool_v_scale)
    if hasattr(module, "pool_compact"):
        check_apart(KeyValueRows(pool_k, pool_v, pool_k_scale, pool_v_scale))  # the kernel knows the first address only
        checks.call(module, "pool_compact", _check_compact, *arguments)
    else:
        _check_compact(*arguments)
        dense.compact(*arguments)


def _check_compact(k, v, gather, slot, pool_k, pool_v, pool_k_scale, pool_v_scale):
    check_compact(k, v, gather, slot, KeyValueRows(pool_k, pool_v, pool_k_scale, pool_v_scale))
    if k.device.type == "cpu":
        check_compact_values(gather, slot, k.shape[2], len(pool_k))


@torch.library.register_fake("gistkern::compact_into", lib=_library)
def _compact_fake(k, v, gather, slot, pool_k, pool_v, pool_k_scale, pool_v_scale, backend):
    checks.check_devices(k, v, gather, slot, pool_k, pool_v, pool_k_scale, pool_v_scale)


decode = torch.ops.gistkern.decode.default
compact = torch.ops.gistkern.compact_into.default
