"""Calls behind a tail in which some samples bring padding in front: what the cache has read is the real tokens."""

import pytest
import torch
from conftest import make_model, random_ids

import gistkern

MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


@pytest.fixture(params=["absolute", "gist_first"])
def patched(request):
    model = make_model()
    return model, gistkern.patch_llama(model, num_gist_tokens=2, positions=request.param)


def alone(model, streams):
    """Logits ``[tokens, vocabulary]`` of each stream by itself, without a cache."""
    with torch.no_grad():
        return [model(stream[None], use_cache=False).logits[0] for stream in streams]


def test_a_third_turn_of_a_ragged_batch(patched):
    model, handle = patched
    context, turns = random_ids(2, 12), [random_ids(2, n, n) for n in (3, 4, 2)]
    cache = gistkern.compress(model, context)
    with torch.no_grad():
        model(turns[0], past_key_values=cache)
        model(turns[1], attention_mask=MASK, past_key_values=cache)
    chat = torch.cat(turns, 1)
    mask = torch.cat([torch.ones(2, 3), MASK, torch.ones(2, 2)], 1).long()
    assert cache.read.ids().tolist() == torch.where(mask == 1, chat, -1)[:, :7].tolist()
    gists = torch.tensor([handle.gist_token_ids]).expand(2, -1)
    stream = torch.cat([context, gists, chat], 1)
    streams = [row[keep] for row, keep in zip(stream, torch.cat([torch.ones(2, 14), mask], 1) == 1, strict=True)]
    expected = torch.stack([logits[-2:] for logits in alone(model, streams)])
    with torch.no_grad():
        found = model(turns[2], attention_mask=mask, past_key_values=cache.clone()).logits
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    out = model.generate(chat, attention_mask=mask, past_key_values=cache.clone(), max_new_tokens=1, do_sample=False)
    assert torch.equal(out[:, -1], expected[:, -1].argmax(-1))
    # whoever shows the padding as tokens goes on from something else
    with pytest.raises(ValueError, match=r"token 3 of sample 1 .*one of them is padding"):
        model.generate(chat, attention_mask=torch.ones_like(chat), past_key_values=cache.clone(), max_new_tokens=1)


def test_ragged_questions_behind_gists_that_stand_at_the_end(patched):
    """The gists of an open segment move over the padding; under "gist_first" they were taken for new ones."""
    model, handle = patched
    context = torch.cat([random_ids(2, 6), torch.tensor([handle.gist_token_ids] * 2)], 1)
    question, cache = random_ids(2, 4, 2), gistkern.GistCache()
    with torch.no_grad():
        model(context, past_key_values=cache)
        found = model(question, attention_mask=MASK, past_key_values=cache).logits
    expected = alone(model, [torch.cat([c, q[m == 1]]) for c, q, m in zip(context, question, MASK, strict=True)])
    for row, logits in enumerate(expected):
        real = int(MASK[row].sum())
        torch.testing.assert_close(found[row, -real:], logits[-real:], rtol=0, atol=1e-10)
    assert cache.gist_rows.tolist() == [3, 3]


def test_positions_are_compared_on_real_tokens(patched):
    model, _ = patched
    cache = gistkern.compress(model, random_ids(2, 12))
    whole = torch.cat([torch.ones(2, 3), MASK], 1).long()
    counted = (whole.cumsum(1) - 1).masked_fill(whole == 0, 1)[:, -4:]  # as transformers counts
    with torch.no_grad():
        model(random_ids(2, 3, 3), past_key_values=cache)
        expected = model(random_ids(2, 4), attention_mask=whole, past_key_values=cache.clone()).logits
        given = {"attention_mask": whole, "position_ids": counted}
        assert torch.equal(model(random_ids(2, 4), past_key_values=cache.clone(), **given).logits, expected)
        given["position_ids"] = counted + torch.tensor([0, 0, 0, 1])
        with pytest.raises(ValueError, match="position_ids are set by the position scheme"):
            model(random_ids(2, 4), past_key_values=cache.clone(), **given)
