"""Two and four processes compute what one does: outputs and gradients, at the op and in models."""

import json
from pathlib import Path

import pytest
import torch
from launching import launch
from parallel_cases import (
    KEPT,
    LAYOUTS,
    MODELS,
    TAILS,
    contexts,
    last_labels,
    layout_of,
    losses_and_gradients,
    model_of,
    op_inputs,
)
from safetensors.torch import load_file

from gistkern import gist_attention
from gistkern.distributed import split_layout
from gistkern.training import answer_loss

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("context parallel"), pytest.mark.timeout(600)]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
LOSS = {"rtol": 1e-5, "atol": 1e-7}  # transformers takes the logits of a loss to fp32


class Ranks:
    """What each rank of a launch wrote."""

    def __init__(self, folder, processes):
        self.folder, self.processes = folder, processes

    def __call__(self, name):
        return [load_file(self.folder / f"{name}-{rank}.safetensors") for rank in range(self.processes)]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Folders of what four processes wrote, and what two of them did as a group of their own."""
    folder = tmp_path_factory.mktemp("ranks")
    for processes in ("2", "4"):
        (folder / processes).mkdir()
    launch(Path(__file__).with_name("worker.py"), 4, folder)
    return folder


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, launched):
    return Ranks(launched / str(request.param), request.param)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_op_equals_one_process(ranks, name):
    layout = layout_of(name)
    inputs = op_inputs(layout)
    leaves = inputs.q, inputs.k, inputs.v
    out = gist_attention(*leaves, layout)
    whole = dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, leaves, inputs.grad_out)), strict=True))
    for shard, found in zip(split_layout(layout, ranks.processes), ranks("op"), strict=True):
        for key, value in whole.items():
            torch.testing.assert_close(found[f"{name}/{key}"], shard.take(value, 2), **CLOSE, msg=key)


def assert_gradients(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[f"grad/{name}"], value, **LOSS, msg=name)


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_equals_one_process(ranks, padded):
    handle = model_of()
    loss, gradients, logits = losses_and_gradients(handle, [contexts(handle, 0, padded)])
    assert len(gradients) == len(list(handle.model.parameters()))
    every = ranks(f"model-{padded}")
    for found in every:
        torch.testing.assert_close(found["loss"], loss, **LOSS)
        assert_gradients(found, gradients)
    shards = [found["logits"] for found in every]
    assert len({len(shard[0]) for shard in shards}) > 1 or ranks.processes == 2, "shards of unequal rows were met"
    torch.testing.assert_close(torch.cat(shards, 1), logits, **CLOSE)


@pytest.mark.parametrize("kind", MODELS)
def test_activation_checkpointing(ranks, kind):
    handle = model_of(kind=kind)
    loss, gradients, _ = losses_and_gradients(handle, [contexts(handle, 0, padded=True)])
    for found in ranks(f"checkpointed-{kind}"):
        torch.testing.assert_close(found["loss"], loss, **LOSS)
        assert_gradients(found, gradients)


def test_autocast(ranks):
    """bf16 layers: gradients err by what those of one process under autocast err, against fp64."""
    handle, plain = model_of(), model_of()
    batch = contexts(handle, 0, padded=True)
    _, exact, _ = losses_and_gradients(handle, [batch])
    plain.model.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = plain.model(batch[0], attention_mask=batch[1], labels=batch[2], use_cache=False).loss
    loss.backward()
    whole = {name: parameter.grad for name, parameter in plain.model.named_parameters()}

    def error(found):
        return sum(((found[name] - value) ** 2).sum() for name, value in exact.items()) ** 0.5

    budget = error(whole)
    assert budget > 1e-4, "bf16 was used"
    for found in ranks("autocast"):
        assert budget / 10 < error({name: found[f"grad/{name}"] for name in exact}) <= 2 * budget
        assert abs(found["loss"] - loss) < 1e-2 * loss


@pytest.mark.parametrize("name", TAILS)
def test_the_training_losses_equal_one_process(ranks, name):
    handle = model_of()
    ids, mask, labels = contexts(handle, 0, padded=True)
    loss = answer_loss(handle.model, ids, last_labels(labels, TAILS[name]), attention_mask=mask)
    loss.backward()
    for found in ranks("tail"):
        torch.testing.assert_close(found[f"{name}/loss"], loss.detach(), **CLOSE)
        for key, parameter in handle.model.named_parameters():
            torch.testing.assert_close(found[f"{name}/grad/{key}"], parameter.grad, **LOSS, msg=key)


@pytest.mark.parametrize("name", KEPT)
def test_kept_logits_are_those_of_the_whole_context_on_every_rank(ranks, name):
    handle = model_of()
    ids, mask, _ = contexts(handle, 0, padded=True)
    with torch.no_grad():
        logits = handle.model(ids, attention_mask=mask, use_cache=False, logits_to_keep=KEPT[name]).logits
    for found in ranks("tail"):
        torch.testing.assert_close(found[f"{name}/logits"], logits, **CLOSE)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_it_composes_with_data_parallel_training(ranks, wrap):
    """A mesh of two replicas of data by two shards of context."""
    if ranks.processes != 4:
        pytest.skip("a mesh of two by two has four processes")
    handle = model_of()
    batches = [contexts(handle, seed) for seed in range(2)]
    _, gradients, _ = losses_and_gradients(handle, batches)
    for rank, found in enumerate(ranks(wrap)):
        alone, _, _ = losses_and_gradients(model_of(), [batches[rank // 2]])
        torch.testing.assert_close(found["loss"], alone, **LOSS)
        assert_gradients(found, gradients)


def test_what_would_go_wrong_silently_is_refused(ranks):
    for rank in range(ranks.processes):
        ids, *labels, embeds, cached, kept, both, beyond, unknown = json.loads(
            (ranks.folder / f"refusals-{rank}.json").read_text()
        )
        assert "were called with different input_ids: each needs the whole" in ids
        assert len(labels) == 2
        assert all("with different labels: each" in one for one in labels)
        assert "with different inputs_embeds: each" in embeds
        assert "caches none: pass use_cache=False" in cached
        assert "with different logits_to_keep: each" in kept
        assert "logits_to_keep leaves columns out of it" in both
        assert "int64 [T] columns below" in beyond
        assert "process group or a DeviceMesh of one dimension" in unknown
