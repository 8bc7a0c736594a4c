"""Gist-masked attention against what a user would write without gistkern, checked equal first.

    make bench

Compare the medians of one group with each other; absolute times mean nothing across machines.
"""

import pytest
import torch
import torch.nn.functional as F

from gistkern import GistLayout, gist_attention
from gistkern.testing import make_inputs

# Llama-3-8B heads; (raw tokens per segment, gists per segment, rows)
SHAPES = {"512/8 N=4K": (512, 8, 4096), "256/16 N=4K": (256, 16, 4096)}
HEADS = {"heads": 32, "kv_heads": 8, "head_dim": 128}


def ours(q, k, v, layout):
    return gist_attention(q, k, v, layout)


def dense_mask(q, k, v, layout):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=layout.token_mask()[:, None], enable_gqa=True)


def plain_causal(q, k, v, layout):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("implementation", [ours, dense_mask, plain_causal], ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(benchmark, shape, implementation):
    raw, gists, rows = SHAPES[shape]
    segments = rows // (raw + gists)
    layout = GistLayout.from_segments([raw] * segments, gists, tail=rows - segments * (raw + gists))
    inputs = make_inputs(layout, **HEADS)
    q, k, v = (t.detach() for t in (inputs.q, inputs.k, inputs.v))
    if implementation is not plain_causal:  # the one that ignores the mask computes something else
        torch.testing.assert_close(implementation(q, k, v, layout), ours(q, k, v, layout), rtol=1e-4, atol=1e-5)
    benchmark.group = f"forward {shape}"
    benchmark.pedantic(implementation, (q, k, v, layout), rounds=5, warmup_rounds=1)
