"""What a CUDA graph of a step over a cache of fixed size relies on: one program, whose memory stays where it is."""

import pytest
import torch
from conftest import make_model, random_ids
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import gistkern
from gistkern.rows import KeyValueRows

pytestmark = pytest.mark.filterwarnings("ignore:the gist rows were never trained")


class Reads(TorchDispatchMode):
    """Operations in their order, and the addresses of what they take that none of them has made."""

    def __init__(self):
        super().__init__()
        self.found, self.made = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        own = {tensor.untyped_storage().data_ptr() for tensor in self.made}
        given = torch.utils._pytree.tree_leaves((args, kwargs))
        tensors = [one for one in given if torch.is_tensor(one)]
        outside = [one.data_ptr() for one in tensors if one.untyped_storage().data_ptr() not in own]
        self.found.append((function, outside))
        out = function(*args, **(kwargs or {}))
        taken = {one.untyped_storage().data_ptr() for one in tensors}
        for one in torch.utils._pytree.tree_leaves(out):  # held, so that no address is given out twice
            if torch.is_tensor(one) and one.untyped_storage().data_ptr() not in taken:
                self.made.append(one)
        return out


def ragged(gist_dtype=None, **changes):
    model = make_model(dtype=torch.float32, **changes)
    gistkern.patch(model, num_gist_tokens=2)
    contexts = gistkern.left_padded([random_ids(1, n, n)[0] for n in (20, 9)])
    cache = gistkern.compress(model, contexts[0], contexts[1].long(), segment_length=8, gist_dtype=gist_dtype)
    return model, cache


@torch.no_grad()
@pytest.mark.parametrize("gist_dtype", [None, torch.int8], ids=str)
def test_steps_read_and_write_the_same_places(gist_dtype):
    model, cache = ragged(gist_dtype)
    fixed, ids = cache.fixed(12), random_ids(2, 1)
    model(ids, past_key_values=fixed)
    steps = []
    for seed in range(3):
        ids.copy_(random_ids(2, 1, seed))
        with Reads() as reads:
            model(ids, past_key_values=fixed)
        steps.append(reads.found)
    assert steps[0] == steps[1] == steps[2]
    kept = {tensor.data_ptr() for layer in fixed.layers for tensor in (*layer.gist.tensors(), *layer.tail.tensors())}
    assert kept <= {address for _, outside in steps[0] for address in outside}


@torch.no_grad()
@pytest.mark.parametrize("gist_dtype", [None, torch.int8], ids=str)
def test_a_recorded_step_is_every_later_one(gist_dtype):
    """No count of the host is in it: recorded once, and run again at places that the recording has not seen."""
    model, cache = ragged(gist_dtype)
    fixed, recorded = cache.fixed(12), cache.fixed(12)
    model(random_ids(2, 1), past_key_values=recorded)  # the host asks once what is in the cache
    recorded.reset_tail()

    def step(ids, length, fed, read, *tails):
        recorded.length, recorded.fed, recorded.ids = length, fed, read
        for layer, key, value in zip(recorded.layers, tails[::2], tails[1::2], strict=True):
            layer.tail = KeyValueRows(key, value)
        return model(ids, past_key_values=recorded).logits

    held = [recorded.length, recorded.fed, recorded.ids]
    held += [tensor for layer in recorded.layers for tensor in layer.tail.tensors()]
    program = make_fx(step)(random_ids(2, 1), *(tensor.clone() for tensor in held))
    for seed in range(10):
        ids = random_ids(2, 1, seed)
        torch.testing.assert_close(program(ids, *held), model(ids, past_key_values=fixed).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(held[0], fixed.length)
    assert torch.equal(held[2], fixed.ids)
