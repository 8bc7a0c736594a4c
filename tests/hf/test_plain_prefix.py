"""Gist rows as the prefix of a model that was never patched (docs/serving.md): where positions allow it, where not."""

import copy

import pytest
import torch
from conftest import make_model, random_ids
from transformers import DynamicCache

from gistkern import compress, patch_llama

LENGTH = 40


def models(**options):
    """A patched model and the same weights unpatched."""
    plain = make_model(initializer_range=0.3)
    return patch_llama(copy.deepcopy(plain), num_gist_tokens=4, **options).model, plain


def prefix_of(cache, plain):
    """A DynamicCache that holds the gist rows."""
    prefix = DynamicCache(config=plain.config)
    for number, layer in enumerate(cache.layers):
        prefix.update(layer.keys.clone(), layer.values.clone(), number)
    return prefix


@pytest.mark.parametrize("segments", [{}, {"segment_length": 16}, {"segment_length": 16, "segment_overlap": 4}])
@torch.no_grad()
def test_rows_are_a_prefix_where_the_tail_begins_behind_them(segments):
    gist, plain = models(positions="gist_first", sink_tokens=0)
    context, question = random_ids(2, LENGTH), random_ids(2, 7, seed=2)
    cache = compress(gist, context, **segments)
    rows = int(cache.gist_rows[0])
    prefix = prefix_of(cache, plain)
    assert prefix.get_seq_length() == rows < LENGTH
    expected = gist(question, past_key_values=cache.clone()).logits
    found = plain(question, past_key_values=copy.deepcopy(prefix)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    said = gist.generate(question, past_key_values=cache, max_new_tokens=8, do_sample=False)
    placeholders = torch.ones(2, rows, dtype=torch.long)  # generate would mask the padding token
    ids = torch.cat([placeholders, question], 1)
    answers = plain.generate(ids, past_key_values=prefix, max_new_tokens=8, do_sample=False)
    assert torch.equal(answers[:, rows:], said)


HIERARCHICAL = {"positions": "gist_first", "sink_tokens": 0, "num_segment_gist_tokens": 3}


@pytest.mark.parametrize(
    ("options", "segments"),
    [
        ({"positions": "absolute", "sink_tokens": 0}, {}),
        ({"positions": "gist_first", "sink_tokens": 1}, {}),
        (HIERARCHICAL, {"segment_length": 16}),
    ],
)
@torch.no_grad()
def test_other_positions_need_more_than_a_prefix(options, segments):
    gist, plain = models(**options)
    context, question = random_ids(1, LENGTH), random_ids(1, 7, seed=2)
    cache = compress(gist, context, **segments)
    found = plain(question, past_key_values=prefix_of(cache, plain)).logits
    expected = gist(question, past_key_values=cache.clone()).logits
    assert (found - expected).abs().max() > 1e-2
    # the rows are right: at the positions that they were made for the unpatched model reads them
    begin = int(gist.model(question, past_key_values=cache.clone()).past_key_values.state.tail_position[0])
    positions = begin + torch.arange(question.shape[1])[None]
    told = plain(question, past_key_values=prefix_of(cache, plain), position_ids=positions).logits
    torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-4)
