"""One rank of the tests: runs every case that test_context_parallel.py compares with a single process."""

import gc
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from parallel_cases import KEPT, LAYOUTS, MODELS, TAILS, contexts, last_labels, layout_of, model_of, op_inputs
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bench.calculated.scale import gist_bytes
from gistkern import patch_llama
from gistkern.distributed import count_traffic, parallel_attention, split_layout
from gistkern.training import answer_loss


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
    assert traffic.received["gists"] + traffic.received["gists, gradients"] == expected
    row = 2 * len(k) * k.shape[1] * k.shape[3] * 8
    assert traffic.received.get("halo", 0) == shard.halos[shard.rank] * row
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def model_case(group, padded):
    """Loss, averaged gradients and this shard's logits of one batch over all ranks."""
    handle = model_of(group)
    ids, mask, labels = contexts(handle, 0, padded)
    with count_traffic() as traffic:
        output = handle.model(ids, attention_mask=mask, labels=labels, use_cache=False)
    assert set(traffic.received) <= {"gists", "halo"}
    output.loss.backward()
    return {"loss": output.loss.detach(), "logits": output.logits.detach()} | averaged(handle.model, group)


def checkpointed_case(group, kind):
    """The same with activations computed again in the backward, exchanges included."""
    handle = model_of(group, kind)
    handle.model.train()
    handle.model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, mask, labels = contexts(handle, 0, padded=True)
    with count_traffic() as traffic:
        loss = handle.model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
        once = traffic.received["gists"]
        loss.backward()
    assert traffic.received["gists"] == 2 * once, "the layers ran twice"
    return {"loss": loss.detach()} | averaged(handle.model, group)


def autocast_case(group):
    """An fp32 model under bf16 autocast."""
    handle = model_of(group)
    handle.model.float()
    ids, mask, labels = contexts(handle, 0, padded=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = handle.model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | averaged(handle.model, group)


def tail_case(group):
    """`answer_loss`, whose few columns lie in one shard or in several, its averaged gradients, and kept logits."""
    handle = model_of(group)
    ids, mask, labels = contexts(handle, 0, padded=True)
    found = {}
    for name, count in TAILS.items():
        handle.model.zero_grad()
        loss = answer_loss(handle.model, ids, last_labels(labels, count), attention_mask=mask)
        loss.backward()
        found |= {f"{name}/loss": loss.detach()}
        found |= {f"{name}/{key}": value for key, value in averaged(handle.model, group).items()}
    with torch.no_grad():
        for name, keep in KEPT.items():
            output = handle.model(ids, attention_mask=mask, use_cache=False, logits_to_keep=keep)
            found[f"{name}/logits"] = output.logits
    return found


def averaged(model, group):
    """The mean over ranks of every parameter's gradient."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(grad, group=group)
        found[f"grad/{name}"] = grad / dist.get_world_size(group)
    return found


def wrapped_case(mesh, wrap):
    """Loss and gradients of two replicas of data, each over the ranks of `cp`, averaged by DDP or FSDP2."""
    handle = model_of(mesh["cp"])
    batch = contexts(handle, mesh["dp"].get_local_rank())
    # data parallel over everyone: the ranks of a context bring the shards of one gradient
    model = DistributedDataParallel(handle.model) if wrap == "ddp" else fully_shard(handle.model)
    ids, mask, labels = batch
    loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    found = {"loss": loss.detach()}
    for name, parameter in handle.model.named_parameters():
        grad = parameter.grad
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        found[f"grad/{name}"] = grad.detach().clone()
    return found


def refusals(group):
    """What is said to calls that would go wrong silently."""
    handle = model_of(group)
    rank = dist.get_rank(group)
    ids, _, labels = contexts(handle, rank)
    same, *_ = contexts(handle, 0)
    said = []
    for arguments in (
        {"input_ids": ids},
        {"input_ids": same, "labels": labels if rank else None},
        {"input_ids": same, "labels": same.roll(rank, 1)},
        {"inputs_embeds": torch.randn(*ids.shape, 32, dtype=torch.float64) + rank},
        {"input_ids": ids, "use_cache": True},
        {"input_ids": same, "logits_to_keep": 1 + rank},
        {"input_ids": same, "logits_to_keep": 1, "labels": same},
        {"input_ids": same, "logits_to_keep": torch.tensor([same.shape[1]])},
    ):
        try:
            handle.model(**{"use_cache": False, **arguments})
        except ValueError as error:
            said.append(str(error))
    try:
        handle.unpatch()
        patch_llama(handle.model, context_parallel="cp")
    except ValueError as error:
        said.append(str(error))
    return said


def save(folder, name, tensors, group=None):
    file = folder / f"{name}-{dist.get_rank(group)}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)


def every_case(folder, group):
    """What this rank of a group computes."""
    for padded in (False, True):
        save(folder, f"model-{padded}", model_case(group, padded), group)
    save(folder, "tail", tail_case(group), group)
    for kind in MODELS:
        save(folder, f"checkpointed-{kind}", checkpointed_case(group, kind), group)
    save(folder, "autocast", autocast_case(group), group)
    (folder / f"refusals-{dist.get_rank(group)}.json").write_text(json.dumps(refusals(group)))
    tensors = {f"{name}/{key}": value for name in LAYOUTS for key, value in op_case(name, group).items()}
    save(folder, "op", tensors, group)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    every_case(folder / "4", dist.group.WORLD)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    for wrap in ("ddp", "fsdp"):
        save(folder / "4", wrap, wrapped_case(mesh, wrap))
    pair = dist.new_group([0, 1])
    if dist.get_rank() in (0, 1):
        every_case(folder / "2", pair)
    dist.barrier()
    gc.collect()  # a DistributedDataParallel that outlives its process group can wait for it for ever
    dist.destroy_process_group()
