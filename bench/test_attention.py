"""Gist-masked attention against what a user would write without gistkern, checked equal first.

    make bench

Compare the medians of one group with each other; absolute times mean nothing across machines.
"""

import pytest
import torch
import torch.nn.functional as F

from bench.shapes import HEADS, layout_of
from gistkern import gist_attention
from gistkern.testing import make_inputs

SHAPES = {"512/8 N=4K": ("512/8", 4096), "256/16 N=4K": ("256/16", 4096)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = {"rtol": 2e-2, "atol": 2e-2} if DEVICE == "cuda" else {"rtol": 1e-4, "atol": 1e-5}


def ours(q, k, v, layout):
    return gist_attention(q, k, v, layout)


def sdpa_path(q, k, v, layout):
    """What serves a CPU without the compiled extension."""
    return gist_attention(q, k, v, layout, backend="sdpa")


def dense_mask(q, k, v, layout):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.token_mask()[:, None], enable_gqa=True)


def plain_causal(q, k, v, layout):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def finished(implementation, *arguments):
    """The call until the device is done with it, not until it is queued."""
    implementation(*arguments)
    if DEVICE == "cuda":
        torch.cuda.synchronize()


IMPLEMENTATIONS = [ours, *([sdpa_path] if DEVICE == "cpu" else []), dense_mask, plain_causal]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(benchmark, shape, implementation):
    layout = layout_of(*SHAPES[shape]).to(DEVICE)
    heads, kv_heads, head_dim = HEADS["Llama-3-8B"]
    inputs = make_inputs(layout, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=DTYPE)
    q, k, v = (t.detach() for t in (inputs.q, inputs.k, inputs.v))
    if implementation is not plain_causal:  # the one that ignores the mask computes something else
        torch.testing.assert_close(implementation(q, k, v, layout), ours(q, k, v, layout), **TOLERANCE)
    benchmark.group = f"forward {shape}"
    benchmark.pedantic(finished, (implementation, q, k, v, layout), rounds=5, warmup_rounds=1)
