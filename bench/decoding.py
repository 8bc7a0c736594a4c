"""One decoding step over gist rows and tail: the op beside what else attends to the same rows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.case import OURS, Case
from bench.limits import copy
from bench.shapes import HEADS
from gistkern import GistLayout, gist_attention

__all__ = ["BASELINES", "decoding_case"]

LIMIT = "copy"
BASELINES = {
    "sdpa": "SDPA over one buffer of all rows",
    "sdpa cuDNN": "SDPA, cuDNN",
    "flashinfer": "FlashInfer, batch decode",
}


def decoding_case(
    gists: int, tail: int, batch: int, heads: str, device: str = "cpu", only: Collection[str] | None = None
) -> Case:
    """One query row per sample over `gists` compact and `tail` local rows.

    The baselines get all rows in one buffer, as a cache without gists would hold them: they copy nothing.
    """
    query_heads, kv_heads, dim = HEADS[heads]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, rows: int) -> torch.Tensor:
        return torch.randn(batch, count, rows, dim, generator=generator).to(device, dtype)

    layout = GistLayout.decode(gists, tail, batch_size=batch).to(device)
    q, gist_k, gist_v = draw(query_heads, 1), draw(kv_heads, gists), draw(kv_heads, gists)
    k, v = draw(kv_heads, tail + 1), draw(kv_heads, tail + 1)
    keys, values = torch.cat([gist_k, k], 2), torch.cat([gist_v, v], 2)
    calls: dict[str, Callable[[], Any]] = {
        OURS: lambda: gist_attention(q, k, v, layout, past_key=gist_k, past_value=gist_v)
    }
    expected = calls[OURS]()
    not_measured = {}
    for name in BASELINES if only is None else only:
        call = _baseline(name, q, keys, values)
        if isinstance(call, str):
            not_measured[name] = call
            continue
        rtol, atol = (1e-4, 1e-5) if device == "cpu" else (2e-2, 2e-2)
        torch.testing.assert_close(call(), expected, rtol=rtol, atol=atol)  # no number on a red check
        calls[name] = call
    calls[LIMIT], limit_work = copy(device)
    # a copy reads and writes, decoding reads
    return Case(device, calls, not_measured, LIMIT, keys.nbytes + values.nbytes, limit_work)


def _baseline(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor] | str:
    if name == "sdpa":
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    if q.device.type == "cpu":
        return "needs a GPU"
    if name == "flashinfer":
        return _flashinfer(q, k, v) if importlib.util.find_spec("flashinfer") else "flashinfer is not installed"

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    try:
        cudnn()
    except RuntimeError as error:
        return f"cuDNN refuses: {str(error).splitlines()[0]}"
    return cudnn


def _flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Paged decoding with one page per sample, planned outside the clock."""
    import flashinfer

    batch, heads, _, dim = q.shape
    rows = k.shape[2]
    pages = torch.stack([k, v], 1)  # HND: [pages, 2, Hkv, rows, D]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(128 << 20, dtype=torch.uint8, device=q.device), "HND"
    )
    first = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    filled = torch.full((batch,), rows, dtype=torch.int32, device=q.device)
    wrapper.plan(first, first[:-1], filled, heads, k.shape[1], dim, rows, q_data_type=q.dtype, kv_data_type=k.dtype)
    return lambda: wrapper.run(q[:, :, 0], pages)[:, :, None]
