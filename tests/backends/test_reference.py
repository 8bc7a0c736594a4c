"""The specification itself: its gradients, and agreement with torch's own attention on the dense mask."""

import torch
import torch.nn.functional as F

from gistkern import GistLayout
from gistkern.backends import reference
from gistkern.kernels.arguments import AttentionArguments
from gistkern.testing import make_inputs

LAYOUT = GistLayout.stack(
    [GistLayout.from_segments([4, 3], 2, tail=2), GistLayout.hierarchical([3, 2], 1, 2, tail=1)], "left"
)


def test_gradcheck():
    inputs = make_inputs(LAYOUT, heads=2, kv_heads=1, head_dim=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference.from_layout(q, k, v, LAYOUT)[0], (inputs.q, inputs.k, inputs.v)
    )


def test_written_out_backward_is_the_gradient():
    inputs = make_inputs(LAYOUT, heads=4, kv_heads=2, dtype=torch.float64)
    gist = [torch.randn(2, 2, LAYOUT.num_compact, 32, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    leaves = (inputs.q, inputs.k, inputs.v, *gist)
    arguments = AttentionArguments(*leaves, LAYOUT.gist_begin, LAYOUT.gist_end, LAYOUT.local_begin, 0.2)
    out, lse = reference.forward(arguments)
    expected = torch.autograd.grad(out, leaves, inputs.grad_out)
    with torch.no_grad():
        ours = reference.backward(arguments, inputs.grad_out, out, lse)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_agrees_with_torch_attention_under_the_token_mask():
    layout = GistLayout.from_segments([9, 8], 2, tail=4)
    inputs = make_inputs(layout, heads=4, kv_heads=2, dtype=torch.float64)
    out, lse = reference.from_layout(inputs.q, inputs.k, inputs.v, layout)
    mask = layout.token_mask()[:, None]
    expected = F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    scores = inputs.q @ inputs.k.repeat_interleave(2, 1).mT * 32**-0.5
    torch.testing.assert_close(lse, scores.masked_fill(~mask, -torch.inf).logsumexp(-1))
