"""Two and four processes compute what one does: outputs and gradients, at the op and in models."""

import pytest
import torch
from parallel_cases import LAYOUTS, launch, layout_of, op_inputs
from safetensors.torch import load_file

from gistkern import gist_attention
from gistkern.distributed import split_layout

pytestmark = [pytest.mark.xdist_group("context parallel"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """What each rank of a launch wrote."""
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    launch("worker.py", request.param, folder)
    return [load_file(folder / f"op-{rank}.safetensors") for rank in range(request.param)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_op_equals_one_process(ranks, name):
    layout = layout_of(name)
    inputs = op_inputs(layout)
    out = gist_attention(inputs.q, inputs.k, inputs.v, layout)
    whole = dict(
        zip(
            ("out", "dq", "dk", "dv"),
            (out, *torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.grad_out)),
            strict=True,
        )
    )
    for shard, found in zip(split_layout(layout, len(ranks)), ranks, strict=True):
        for key, value in whole.items():
            torch.testing.assert_close(
                found[f"{name}/{key}"],
                shard.take(value, 2),
                rtol=1e-12,
                atol=1e-13,
                msg=lambda text, key=key: f"{key}: {text}",
            )
