"""Torch's own causal attention beside the reference, for the tests on a CPU and on a GPU."""

import torch

from gistkern import GistLayout
from gistkern.backends import plain, reference
from gistkern.testing import assert_within_budget, make_inputs

SCALE = 0.3


def check(device, *, dtype, kv_heads=2, head_dim=24, strided=False, rows=65):
    """Output and gradients within the budget; strided: rows of [batch, rows, heads, D], the elements apart too."""
    layout = GistLayout.stack([GistLayout.from_segments([rows - 4], 4)] * 2).to(device)
    assert layout.plain
    inputs = make_inputs(layout, heads=4, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    leaves = list(inputs.leaves().values())
    given = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in leaves] if strided else leaves
    out = plain.attend(*given, scale=SCALE)
    assert out.dtype == dtype
    ours = out, *torch.autograd.grad(out, leaves, inputs.grad_out)
    exact, rounded = (_oracle(inputs.cast(kind), layout) for kind in (torch.float64, dtype))
    for name, *values in zip(("out", "dq", "dk", "dv"), ours, exact, rounded, strict=True):
        assert_within_budget(name, *values, factor=3.0 if name.startswith("d") else 2.0)


def _oracle(inputs, layout):
    out, _ = reference.from_layout(inputs.q, inputs.k, inputs.v, layout, scale=SCALE)
    return out, *torch.autograd.grad(out, list(inputs.leaves().values()), inputs.grad_out)
