"""torch's fully_shard around a patched model: the root's weights are whole in the root's own forward only."""

import copy

import pytest
import torch
import torch.distributed as dist
from contact_cases import patched, random_ids
from torch.distributed.fsdp import fully_shard

import gistkern

pytestmark = pytest.mark.slow


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_model_trains_and_compresses(alone):
    model, _, ids = patched()
    whole = copy.deepcopy(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    losses = [one.train()(ids, labels=ids).loss for one in (model, whole)]
    losses[0].backward()
    assert torch.equal(*losses)
    model.eval()
    whole.eval()
    with pytest.raises(ValueError, match=r"call model.unshard\(\) first"):
        gistkern.compress(model, random_ids(9))
    model.unshard()
    found, expected = (gistkern.compress(one, random_ids(9)) for one in (model, whole))
    assert found.fingerprint == expected.fingerprint
    question = random_ids(4, 2)
    assert torch.equal(model(question, past_key_values=found).logits, whole(question, past_key_values=expected).logits)
