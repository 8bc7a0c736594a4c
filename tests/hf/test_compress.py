"""What `compress` refuses, and what it leaves alone."""

import pytest
import torch
from conftest import make_model, random_ids

import gistkern


def test_refusals(model):
    with pytest.raises(ValueError, match="knows no gist tokens"):
        gistkern.compress(model, random_ids(1, 5))
    with gistkern.patch_llama(model, num_gist_tokens=2) as handle:
        for arguments, message in [
            ({"input_ids": random_ids(1, 5)[0]}, r"input_ids must be \[batch, tokens\]"),
            ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "at least one token"),
            ({"input_ids": torch.tensor([[1, handle.gist_token_ids[0]]])}, "holds gist tokens already"),
            (
                {"input_ids": random_ids(2, 3), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
                "sample 1 .* empty",
            ),
            ({"input_ids": random_ids(1, 3), "attention_mask": torch.ones(1, 2)}, "like input_ids"),
            ({"input_ids": random_ids(1, 3), "segment_length": 0}, "segment_length must be an int >= 1"),
        ]:
            with pytest.raises(ValueError, match=message):
                gistkern.compress(model, **arguments)


def test_hierarchical_needs_a_segment_length():
    model = make_model()
    gistkern.patch_llama(model, num_segment_gist_tokens=2, sink_tokens=4)
    with pytest.raises(ValueError, match="compresses in segments: pass segment_length"):
        gistkern.compress(model, random_ids(1, 9))
    with pytest.raises(ValueError, match="segment_length must be at least the 4 sink tokens"):
        gistkern.compress(model, random_ids(1, 9), segment_length=3)


@pytest.mark.parametrize("segment_gists", [0, 2])
def test_overlapping_segments_read_the_boundary_twice(model, segment_gists):
    """A context of 17 tokens in segments of 7 that share 3: the stream repeats those three."""
    handle = gistkern.patch_llama(model, num_gist_tokens=3, num_segment_gist_tokens=segment_gists)
    context, tail = random_ids(1, 17), random_ids(1, 4, 2)
    pieces = [context[:, begin : begin + 7] for begin in (0, 4, 8, 12)]
    assert torch.equal(pieces[-1], context[:, 12:17])
    ends = torch.tensor([handle.segment_gist_token_ids or handle.gist_token_ids])
    stream = torch.cat([part for piece in pieces for part in (piece, ends)], 1)
    layout = None
    if segment_gists:
        stream = torch.cat([stream, torch.tensor([handle.gist_token_ids])], 1)
        layout = gistkern.GistLayout.hierarchical([7, 7, 7, 5], 2, 3, tail=4)
    with torch.no_grad():
        full = model(torch.cat([stream, tail], 1), gist_layout=layout, use_cache=False).logits[:, -4:]
        cache = gistkern.compress(model, context, segment_length=7, segment_overlap=3)
        torch.testing.assert_close(model(tail, past_key_values=cache).logits, full, rtol=0, atol=1e-12)
    for arguments in ({"segment_length": 3, "segment_overlap": 3}, {"segment_overlap": 1}):
        with pytest.raises(ValueError, match="segment_overlap must be less than segment_length"):
            gistkern.compress(model, context, **arguments)


def test_training_mode_and_gradients_are_left_as_they_were(model):
    with gistkern.patch_llama(model):
        model.train()
        model.model.layers[0].eval()
        cache = gistkern.compress(model, random_ids(1, 9))
        assert model.training
        assert not model.model.layers[0].training
        assert not cache.layers[0].gist.key.requires_grad


def test_a_thousand_times_longer_context_needs_no_more_rows():
    model = make_model(num_hidden_layers=1, hidden_size=32, intermediate_size=32, dtype=torch.float32)
    gistkern.patch_llama(model, num_gist_tokens=3, num_segment_gist_tokens=1, positions="gist_first", sink_tokens=0)
    short, long = (gistkern.compress(model, random_ids(1, n), segment_length=64) for n in (20, 20_000))
    assert short.nbytes == long.nbytes
    assert long.get_seq_length() == 20_000 + 313 + 3
