"""One decoding step over gist rows and tail: the op beside what else attends to the same rows."""

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F

from bench.measured.case import OURS, Case, serve
from bench.measured.limits import copy
from bench.measured.timing import captured
from bench.shapes import HEADS
from gistkern import GistLayout, gist_attention

LIMIT = "copy"
BASELINES = {"sdpa": "SDPA over one buffer of all rows", "sdpa cuDNN": "SDPA, cuDNN"}
Decode = Callable[[], torch.Tensor]


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

    def ours() -> torch.Tensor:
        return gist_attention(q, k, v, layout, past_key=gist_k, past_value=gist_v)

    # a copy reads and writes, decoding reads; repeated, as a model's layers are queued one after another
    work, repeat = keys.nbytes + values.nbytes, 20 if batch < 64 else 4
    case = Case(device, {OURS: captured(ours, device)}, limit=LIMIT, work=work, repeat=repeat, queued=True)
    expected = ours()

    def check(found: torch.Tensor) -> None:
        rtol, atol = (1e-4, 1e-5) if device == "cpu" else (2e-2, 2e-2)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)  # no number on a red check

    for name in BASELINES if only is None else only:
        if name != "sdpa" and device == "cpu":
            case.not_measured[name] = "needs a GPU"
        else:
            serve(case, name, lambda name=name: captured(_MAKE[name](q, keys, values), device), check)
    case.calls[LIMIT], case.limit_work = copy(device)
    return case


def _packed(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The query heads of one key head as its query rows, ``[B, Hkv, group, D]``: each key is then read once."""
    batch, heads, _, dim = q.shape
    return q.view(batch, k.shape[1], heads // k.shape[1], dim)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Decode:
    return lambda: F.scaled_dot_product_attention(_packed(q, k), k, v).view(q.shape)


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Decode:
    # what SDPA calls when it chooses cuDNN: choosing it by a context would be on the clock
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    return lambda: attend(_packed(q, k), k, v, None, False)[0].view(q.shape)


_MAKE = {"sdpa": _sdpa, "sdpa cuDNN": _cudnn}
