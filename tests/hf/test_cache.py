"""GistCache: sizes, cropping, batch operations."""

import pytest
import torch
from conftest import make_model, random_ids

import gistkern
from gistkern.cache.versions import CACHE, CROP_TAKES_LENGTH


@pytest.fixture
def patched(model):
    return model, gistkern.patch_llama(model, num_gist_tokens=3, sink_tokens=1)


def logits(model, cache, seed=9, batch=1):
    with torch.no_grad():
        return model(random_ids(batch, 3, seed), past_key_values=cache).logits


def test_lengths_logical_and_physical(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(1, 50))
    assert cache.get_seq_length() == 53
    assert cache.get_mask_sizes(2, 0) == (4 + 2, 0)
    assert cache.nbytes == 3 * 2 * 2 * 4 * 16 * 8, "layers x (k, v) x kv heads x rows x head_dim x fp64"
    logits(model, cache)
    assert cache.get_seq_length() == 56
    assert (cache.gist_rows.tolist(), cache.tail_rows.tolist()) == ([4], [3])
    assert "tail rows=[3]" in repr(cache)


def test_full_cache_never_exists(patched):
    """While a layer attends it holds raw rows; every layer before it holds gist rows only."""
    model, _ = patched
    sizes = []
    cache_seen = {}

    def look(module, args, kwargs):
        cache = cache_seen["cache"] = kwargs[CACHE]
        sizes.append([layer.gist.key.shape[2] + layer.tail.key.shape[2] for layer in cache.layers])

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers]
    gistkern.compress(model, random_ids(1, 200))
    assert sizes == [[], [4], [4, 4]]
    for hook in hooks:
        hook.remove()


def test_crop_takes_back_tail_tokens(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(2, 20))
    expected = logits(model, cache.clone(), batch=2)
    logits(model, cache, seed=4, batch=2)
    cache.crop(-3)
    assert torch.equal(logits(model, cache, batch=2), expected)
    cache.crop(0)
    with pytest.raises(ValueError, match="cannot crop 4 tokens: only the 3 raw tokens"):
        cache.crop(-4)
    if CROP_TAKES_LENGTH:  # a positive number says how many tokens stay
        cache.crop(4)
        assert cache.tail_rows.tolist() == [3, 3]
        cache.crop(2)
        assert cache.tail_rows.tolist() == [2, 2]
    else:
        with pytest.raises(ValueError, match="negative count"):
            cache.crop(4)


def test_reorder_repeat_and_select_follow_the_samples(patched):
    model, _ = patched
    contexts = random_ids(3, 20)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, :7] = 0
    cache = gistkern.compress(model, contexts, mask)
    question = random_ids(1, 3).expand(3, -1)
    answers = model(question, past_key_values=cache.clone()).logits
    cache.reorder_cache(torch.tensor([2, 2, 1]))
    assert cache.state.seen.tolist() == [23, 23, 16]
    torch.testing.assert_close(
        model(question, past_key_values=cache.clone()).logits, answers[[2, 2, 1]], rtol=0, atol=1e-12
    )
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    many = model(random_ids(1, 3).expand(4, -1), past_key_values=cache).logits
    torch.testing.assert_close(many, answers[[2, 2, 1, 1]], rtol=0, atol=1e-12)


def test_clone_is_independent(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(1, 20))
    copy = cache.clone()
    expected = logits(model, cache.clone())
    copy.layers[0].gist.key.zero_()
    logits(model, copy)
    assert torch.equal(logits(model, cache), expected)


def test_reset_forgets(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(1, 20))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.batch_size, repr(cache)) == (0, 0, -1, "GistCache(empty)")
    assert torch.equal(logits(model, cache), logits(model, gistkern.GistCache()))
    with pytest.raises(ValueError, match="no model call has written"):
        gistkern.GistCache().crop(-1)


def test_cache_of_another_dtype_is_refused(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(1, 20)).to(dtype=torch.float32)
    assert cache.layers[0].gist.key.dtype == torch.float32
    with pytest.raises(ValueError, match=r"the cache holds torch.float32 on cpu, the model computes torch.float64"):
        logits(model, cache)


def test_a_call_that_fails_leaves_the_bookkeeping(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(1, 20))
    state = cache.state
    with pytest.raises(ValueError, match="padding between"):
        model(random_ids(1, 3), attention_mask=torch.tensor([[1, 0, 1]]), past_key_values=cache)
    assert cache.state is state


def test_ragged_streaming_drops_each_sample_on_its_own(model):
    """Samples end their segments at different calls; each one's view stays that of its own stream."""
    with gistkern.patch_llama(model, num_gist_tokens=2, sink_tokens=1) as handle, torch.no_grad():
        a, b = handle.gist_token_ids
        rows = [[1, 2, a, b, 3, 4, 5, 6], [1, 2, 3, 4, a, b, 7, 8]]
        cache = gistkern.GistCache()
        pieces = [model(piece, past_key_values=cache).logits for piece in torch.tensor(rows).split(2, 1)]
        streamed = torch.cat(pieces, 1)
        for row in range(2):
            alone = model(torch.tensor(rows[row : row + 1])).logits[0]
            torch.testing.assert_close(streamed[row], alone, rtol=0, atol=1e-12)
        assert (cache.gist_rows.tolist(), cache.tail_rows.tolist()) == ([3, 3], [4, 2])


def test_float32_and_bfloat16_models():
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype=dtype)
        with gistkern.patch_llama(model, num_gist_tokens=2), torch.no_grad():
            cache = gistkern.compress(model, random_ids(1, 30), segment_length=8)
            assert cache.layers[0].gist.key.dtype == dtype
            assert model(random_ids(1, 4), past_key_values=cache).logits.isfinite().all()


def test_a_cache_of_the_other_position_scheme_is_refused(patched):
    model, handle = patched
    cache = gistkern.compress(model, random_ids(1, 20))
    handle.unpatch()
    with (
        gistkern.patch_llama(model, num_gist_tokens=3, positions="gist_first"),
        pytest.raises(ValueError, match="written with positions='absolute'"),
    ):
        logits(model, cache)
