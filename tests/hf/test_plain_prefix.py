"""Gist rows as the prefix of a model that was never patched (docs/guides/serving.md)."""

import copy

import pytest
import torch
from conftest import FAMILIES, make_model, random_ids
from transformers import DynamicCache

from gistkern import GistCache, compress, patch_llama, plain_prefix

LENGTH = 40
CASES = [
    pytest.param({"positions": positions, "sink_tokens": sinks, **summary}, segments, id=name)
    for positions in ("absolute", "gist_first")
    for sinks in (0, 1)
    for name, summary, segments in (
        ("one-segment", {}, {}),
        ("segments", {}, {"segment_length": 16, "segment_overlap": 4}),
        ("hierarchical", {"num_segment_gist_tokens": 3}, {"segment_length": 16}),
    )
]


def models(family="llama", config=None, **options):
    """A patched model and the same weights unpatched."""
    plain = make_model(family, initializer_range=0.3, **(config or {}))
    return patch_llama(copy.deepcopy(plain), num_gist_tokens=4, **options).model, plain


def ask(model, prefix, question, columns=None):
    """Greedy answers behind a prefix of which sample b owns the last `columns[b]` columns."""
    rows = prefix.get_seq_length()
    placeholders = torch.ones(len(question), rows, dtype=torch.long)  # generate would mask the padding token
    ids = torch.cat([placeholders, question], 1)
    own = torch.full((len(ids),), rows) if columns is None else columns
    mask = torch.arange(ids.shape[1]) >= rows - own[:, None]
    said = model.generate(
        ids, attention_mask=mask.long(), past_key_values=prefix, max_new_tokens=8, do_sample=False, logits_to_keep=1
    )
    return said[:, rows:]


@pytest.mark.parametrize(("options", "segments"), CASES)
@torch.no_grad()
def test_an_unpatched_model_reads_the_rows(options, segments):
    gist, plain = models(**options)
    context, question = random_ids(2, LENGTH), random_ids(2, 7, seed=2)
    cache = compress(gist, context, **segments)
    prefix = plain_prefix(cache, plain.config)
    assert prefix.get_seq_length() == int(cache.gist_rows[0]) < LENGTH
    expected = gist(question, past_key_values=cache.clone()).logits
    found = plain(question, past_key_values=copy.deepcopy(prefix)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # the rotation's angles are fp32 in transformers
    said = gist.generate(question, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert torch.equal(ask(plain, prefix, question), said)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family(family):
    """Whatever part of a key a family turns, whichever way, in whichever layers."""
    unscaled = {"llama_4_scaling_beta": 0.0, "original_max_position_embeddings": 4096}  # refused otherwise
    rotation = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **unscaled}}
    everywhere = {"layer_types": ["full_attention"] * 3} if "layer_types" in FAMILIES[family] else {}
    gist, plain = models(family, rotation if family == "ministral3" else everywhere, positions="gist_first")
    cache, question = compress(gist, random_ids(1, LENGTH)), random_ids(1, 7, seed=2)
    found = plain(question, past_key_values=plain_prefix(cache, plain.config)).logits
    torch.testing.assert_close(found, gist(question, past_key_values=cache).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_scores_that_know_a_position_itself_are_refused():
    gist, plain = models("ministral3")
    cache = compress(gist, random_ids(1, LENGTH))
    with pytest.raises(ValueError, match=r"depend on positions themselves \(llama_4_scaling_beta"):
        plain_prefix(cache, plain.config)


@pytest.mark.parametrize(
    "rotation",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rotation: rotation["rope_type"],
)
@torch.no_grad()
def test_scaled_rotations(rotation):
    gist, plain = models(config={"rope_parameters": {"rope_theta": 10000.0, **rotation}})
    cache, question = compress(gist, random_ids(1, LENGTH)), random_ids(1, 7, seed=2)
    found = plain(question, past_key_values=plain_prefix(cache, plain.config)).logits
    torch.testing.assert_close(found, gist(question, past_key_values=cache).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_samples_of_different_rows():
    gist, plain = models()
    context = random_ids(2, LENGTH)
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[1, :27] = 0
    cache, question = compress(gist, context, real, segment_length=10), random_ids(2, 7, seed=2)
    rows = cache.gist_rows
    assert rows[0] > rows[1]
    said = gist.generate(question, past_key_values=cache.clone(), max_new_tokens=8, do_sample=False)
    assert torch.equal(ask(plain, plain_prefix(cache, plain.config), question, rows), said)


@torch.no_grad()
def test_the_turn_is_what_makes_it_so():
    """The rows as they are, without the turn, are read at the wrong distance."""
    gist, plain = models()
    cache, question = compress(gist, random_ids(1, LENGTH)), random_ids(1, 7, seed=2)
    raw = DynamicCache()
    for index, layer in enumerate(cache.layers):
        raw.update(layer.gist.key.clone(), layer.gist.value.clone(), index)
    found = plain(question, past_key_values=raw).logits
    assert (found - gist(question, past_key_values=cache).logits).abs().max() > 1e-2


@torch.no_grad()
def test_the_cache_is_left_as_it_was():
    gist, plain = models()
    cache = compress(gist, random_ids(1, LENGTH))
    before = [(layer.gist.key.clone(), layer.gist.value.clone()) for layer in cache.layers]
    plain(random_ids(1, 7), past_key_values=plain_prefix(cache, plain.config))
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.gist.key, keys)
        assert torch.equal(layer.gist.value, values)


@torch.no_grad()
def test_what_cannot_be_a_prefix_is_refused():
    gist, plain = models()
    with pytest.raises(ValueError, match="the cache is empty: compress a context first"):
        plain_prefix(GistCache(), plain.config)
    cache = compress(gist, random_ids(1, LENGTH))
    dynamic = copy.deepcopy(plain.config)
    dynamic.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type 'dynamic' turns keys by the length of the text"):
        plain_prefix(cache, dynamic)
    gist(random_ids(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="uncompressed tail"):
        plain_prefix(cache, plain.config)
