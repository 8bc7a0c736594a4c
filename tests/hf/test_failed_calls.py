"""Model calls that fail: what they leave of a cache is refused, or nothing has changed."""

import copy
import pickle

import pytest
import torch
from conftest import make_model, random_ids

import gistkern
from gistkern.corpus.rows import documents_of


@pytest.fixture
def patched():
    model = make_model()
    with gistkern.patch_llama(model, num_gist_tokens=2):
        yield model


def fail(model, cache, module, gradients=False):
    """A call of 3 tokens that ends in an error in front of `module`."""

    def out_of_memory(*_):
        raise MemoryError

    hook = module.register_forward_pre_hook(out_of_memory)
    with torch.set_grad_enabled(gradients), pytest.raises(MemoryError):
        model(random_ids(2, 3), past_key_values=cache)
    hook.remove()


def used(model, tail):
    cache = gistkern.compress(model, random_ids(2, 9))
    if tail:
        with torch.no_grad():
            model(random_ids(2, tail, 7), past_key_values=cache)
    return cache


OPERATIONS = {
    "clone": lambda cache: cache.clone(),
    "crop": lambda cache: cache.crop(-1),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "another dtype": lambda cache: cache.to(dtype=torch.float32),
    "quantize": lambda cache: cache.to(gist_dtype=torch.int8),
    "shared": lambda cache: cache.shared(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "rows of a store": lambda cache: documents_of(cache, []),
    "compact rows": lambda cache: cache.compact(0),
}


@pytest.mark.parametrize("tail", [0, 4])
@pytest.mark.parametrize("gradients", [False, True], ids=["no gradients", "gradients"])
def test_what_failed_between_layers_is_taken_for_no_cache(patched, tmp_path, tail, gradients):
    cache = used(patched, tail)
    whole = cache.clone()
    with torch.no_grad():
        expected = patched(random_ids(2, 3), past_key_values=whole.clone()).logits
    fail(patched, cache, patched.model.layers[1].mlp, gradients)
    uses = {
        **OPERATIONS,
        "call": lambda cache: patched(random_ids(2, 3), past_key_values=cache),
        "save": lambda cache: cache.save(tmp_path / "c"),
        "prefix": lambda cache: gistkern.plain_prefix(cache, patched.config),
    }
    for use in uses.values():
        with pytest.raises(RuntimeError, match="an earlier model call failed half way through the layers"):
            use(cache)
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        assert torch.equal(patched(random_ids(2, 3), past_key_values=whole).logits, expected)
    cache.reset()
    with torch.no_grad():
        found = patched(random_ids(2, 3), past_key_values=cache).logits
    assert torch.equal(found, patched(random_ids(2, 3)).logits)


@pytest.mark.parametrize("tail", [0, 4])
@pytest.mark.parametrize("where", ["in front of the layers", "in the first layer"])
def test_what_failed_before_a_layer_was_updated_changes_nothing(patched, tail, where):
    layer = patched.model.layers[0]
    cache = used(patched, tail)
    with torch.no_grad():
        expected = patched(random_ids(2, 3), past_key_values=cache.clone()).logits
    fail(patched, cache, layer if where == "in front of the layers" else layer.self_attn.v_proj)
    assert cache.to(gist_dtype=torch.int8).gist_dtype == torch.int8
    assert cache.to(dtype=torch.float32).dtype == torch.float32
    copies = [cache.clone(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache]
    with torch.no_grad():
        for one in copies:
            assert torch.equal(patched(random_ids(2, 3), past_key_values=one).logits, expected)


@pytest.mark.parametrize("tail", [0, 4])
def test_a_call_that_a_layer_refuses_changes_nothing(patched, tail):
    """As "use cache.to(...)" says: the cache moves, or the model goes back."""
    cache = used(patched, tail)
    with torch.no_grad():
        expected = patched(random_ids(2, 3), past_key_values=cache.clone()).logits
        if tail:
            patched.to(torch.bfloat16)
            with pytest.raises(ValueError, match=r"the model computes torch\.bfloat16.*cache\.to"):
                patched(random_ids(2, 3), past_key_values=cache)
            assert cache.to(dtype=torch.bfloat16).dtype == torch.bfloat16
            return
        patched.gistkern_handle.backend = "cuda"
        with pytest.raises((RuntimeError, ValueError), match="cuda"):
            patched(random_ids(2, 3), past_key_values=cache)
        patched.gistkern_handle.backend = "auto"
        assert torch.equal(patched(random_ids(2, 3), past_key_values=cache).logits, expected)


def test_rows_that_were_to_be_trained_leave_a_quantized_cache_as_it_was():
    model = make_model(dtype=torch.float32)
    with gistkern.patch_llama(model, num_gist_tokens=2) as handle:
        cache = gistkern.compress(model, random_ids(1, 9), gist_dtype=torch.int8)
        ids = torch.cat([random_ids(1, 3), torch.tensor([handle.gist_token_ids]), random_ids(1, 1)], 1)
        whole = cache.clone()
        with pytest.raises(ValueError, match="gist rows that are trained are not quantized"):
            model(ids, past_key_values=cache)
        with torch.no_grad():
            found, expected = (model(ids, past_key_values=one).logits for one in (cache, whole))
        assert torch.equal(found, expected)


def test_an_empty_cache_begins_anew_in_another_type(patched):
    cache = gistkern.GistCache()
    fail(patched, cache, patched.model.layers[0].self_attn.o_proj)
    with pytest.raises(RuntimeError, match="failed half way"):
        patched(random_ids(2, 3), past_key_values=cache)
    cache = gistkern.GistCache()
    patched.gistkern_handle.backend = "cuda"
    with pytest.raises((RuntimeError, ValueError), match="cuda"):
        patched(random_ids(2, 3), past_key_values=cache)
    patched.gistkern_handle.backend = "auto"
    patched.to(torch.float32)
    with torch.no_grad():
        assert patched(random_ids(2, 3), past_key_values=cache).logits.dtype == torch.float32


def test_after_a_failed_call_an_unpatched_model_is_still_refused(patched):
    cache = used(patched, 0)
    fail(patched, cache, patched.model.layers[0])
    patched.gistkern_handle.unpatch()
    with pytest.raises(RuntimeError, match=r"call gistkern\.patch\(model\)"):
        patched(random_ids(2, 1), past_key_values=cache)
