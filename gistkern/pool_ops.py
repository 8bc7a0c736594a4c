"""The operators under `gistkern.pool`: schemas, shape functions, and who computes them.

Backends that know pools and pages have `pool_decode` and `pool_compact`; the others get dense buffers (pool_dense.py).
"""

from __future__ import annotations

import torch

from gistkern import backends, pool_dense

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
        return module.pool_decode(q, *rest)
    return pool_dense.decode(module.forward, q, *rest)


@torch.library.register_fake("gistkern::decode", lib=_library)
def _decode_fake(q, *arguments):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.impl(_library, "compact_into", "CompositeExplicitAutograd")
def _compact(k, v, gather, slot, pool_k, pool_v, pool_k_scale, pool_v_scale, backend):
    module = backends.get(backend).load()
    write = getattr(module, "pool_compact", pool_dense.compact)
    write(k, v, gather, slot, pool_k, pool_v, pool_k_scale, pool_v_scale)


@torch.library.register_fake("gistkern::compact_into", lib=_library)
def _compact_fake(k, v, gather, slot, pool_k, pool_v, pool_k_scale, pool_v_scale, backend):
    return None


decode = torch.ops.gistkern.decode.default
compact = torch.ops.gistkern.compact_into.default
