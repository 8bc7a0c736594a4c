"""One rank of the tests: runs every case that test_context_parallel.py compares with a single process."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_cases import LAYOUTS, layout_of, op_inputs
from safetensors.torch import save_file

from gistkern.distributed import count_traffic, gist_bytes, parallel_attention, split_layout


def op_case(name, group):
    """Outputs and gradients of this rank's rows, and what it received."""
    layout = layout_of(name)
    shard = split_layout(layout, dist.get_world_size(group))[dist.get_rank(group)]
    inputs = op_inputs(layout)
    q, k, v = (shard.take(t.detach(), 2).clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
    with count_traffic() as traffic:
        out = parallel_attention(q, k, v, shard, group)
        grads = torch.autograd.grad(out, (q, k, v), shard.take(inputs.grad_out, 2))
    tensors = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))
    width = dist.get_world_size(group) * shard.own.shape[1]
    expected = gist_bytes(width, dist.get_world_size(group), k.shape[1], k.shape[3], 8, 8) * len(k)
    assert traffic.received["gists"] + traffic.received["gist gradients"] == expected
    row = 2 * len(k) * k.shape[1] * k.shape[3] * 8
    assert traffic.received.get("halo", 0) == shard.halos[shard.rank] * row
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    tensors = {f"{name}/{key}": value for name in LAYOUTS for key, value in op_case(name, dist.group.WORLD).items()}
    save_file(tensors, folder / f"op-{rank}.safetensors")
    dist.destroy_process_group()
