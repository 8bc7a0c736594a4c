"""The acceptance test: masked full forward == compress + cached decode, logits token by token.

For every family, position scheme, number of sinks, one and many segments, hierarchical segments, and ragged
batches padded on either side.
"""

import pytest
import torch
from conftest import FAMILIES, make_model, random_ids, tolerance

import gistkern
from gistkern import GistLayout

LENGTHS = (23, 14, 1)  # one short context, one that ends inside a segment, one of a single token
TAIL = 6
TOLERANCE = {"rtol": 0, "atol": 1e-12}


def ragged(lengths, side):
    """Contexts of these lengths in one padded batch, and their mask."""
    width = max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place] = random_ids(1, length, seed=row)[0]
        mask[row, place] = 1
    return ids, mask


def segments_of(context, length):
    return context.split(length if length else len(context))


def full_stream(handle, context, tail, segment_length):
    """One sample's whole token stream, with its gist tokens, and its layout (None: read off the ids)."""
    segments = segments_of(context, segment_length)
    if not handle.segment_gist_token_ids:
        gists = torch.tensor(handle.gist_token_ids)
        return torch.cat([part for segment in segments for part in (segment, gists)] + [tail]), None
    ends, summary = torch.tensor(handle.segment_gist_token_ids), torch.tensor(handle.gist_token_ids)
    stream = torch.cat([part for segment in segments for part in (segment, ends)] + [summary, tail])
    layout = GistLayout.hierarchical(
        [len(segment) for segment in segments], len(ends), len(summary), tail=len(tail), sink_tokens=handle.sink_tokens
    )
    return stream, layout


def check(model, handle, segment_length, side):
    close = tolerance(model.config.model_type)
    ids, mask = ragged(LENGTHS, side)
    tail = random_ids(len(LENGTHS), TAIL, seed=99)
    cache = gistkern.compress(model, ids, mask, segment_length=segment_length)
    at_once = model(tail, past_key_values=cache.clone()).logits
    stepped_cache = cache.clone()
    stepped = [model(tail[:, i : i + 1], past_key_values=stepped_cache).logits for i in range(TAIL)]
    torch.testing.assert_close(torch.cat(stepped, 1), at_once, **close)
    for row in range(len(LENGTHS)):
        stream, layout = full_stream(handle, ids[row][mask[row] == 1], tail[row], segment_length)
        full = model(stream[None], gist_layout=layout, use_cache=False).logits[0, -TAIL:]
        torch.testing.assert_close(at_once[row], full, **close)
    expected = 10 if segment_length is None or handle.segment_gist_token_ids else None
    if expected:
        sinks = torch.tensor(LENGTHS).clamp(max=handle.sink_tokens)
        assert torch.equal(cache.gist_rows, sinks + len(handle.gist_token_ids))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("positions", "segment_length"), [("absolute", None), ("gist_first", 7)])
def test_full_forward_equals_compressed_decode(family, positions, segment_length):
    model = make_model(family)
    with gistkern.patch_llama(model, num_gist_tokens=3, positions=positions) as handle, torch.no_grad():
        check(model, handle, segment_length, "right")


@pytest.mark.parametrize("positions", ["absolute", "gist_first"])
@pytest.mark.parametrize("sink_tokens", [0, 1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("call_tokens", [7, 14, 4096])
def test_sinks_padding_sides_and_segments_per_call(model, positions, sink_tokens, side, call_tokens, monkeypatch):
    monkeypatch.setattr("gistkern.hf.compress.call_tokens", lambda *model: call_tokens)
    handle = gistkern.patch_llama(model, num_gist_tokens=2, positions=positions, sink_tokens=sink_tokens)
    with handle, torch.no_grad():
        check(model, handle, 7, side)
        check(model, handle, None, side)


@pytest.mark.parametrize("positions", ["absolute", "gist_first"])
@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize("call_tokens", [7, 14, 4096])
def test_hierarchical(model, positions, sink_tokens, call_tokens, monkeypatch):
    monkeypatch.setattr("gistkern.hf.compress.call_tokens", lambda *model: call_tokens)
    handle = gistkern.patch_llama(
        model, num_gist_tokens=4, positions=positions, sink_tokens=sink_tokens, num_segment_gist_tokens=2
    )
    with handle, torch.no_grad():
        check(model, handle, 7, "left")


@pytest.mark.parametrize("positions", ["absolute", "gist_first"])
def test_full_forward_with_padding_equals_unpadded(model, positions):
    with gistkern.patch_llama(model, num_gist_tokens=2, positions=positions) as handle, torch.no_grad():
        gists = torch.tensor(handle.gist_token_ids)
        streams = [
            torch.cat([random_ids(1, n, seed=n)[0], gists, random_ids(1, 5, seed=n + 1)[0]]) for n in (12, 5, 20)
        ]
        width = max(map(len, streams))
        for side in ("left", "right"):
            ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
            for row, stream in enumerate(streams):
                place = slice(width - len(stream), width) if side == "left" else slice(0, len(stream))
                ids[row, place], mask[row, place] = stream, 1
            logits = model(ids, attention_mask=mask).logits
            for row, stream in enumerate(streams):
                torch.testing.assert_close(logits[row][mask[row] == 1], model(stream[None]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_streaming_in_any_chunks_equals_the_full_forward(model, chunk):
    """Calls may cut the stream anywhere, inside a run of gists too (absolute positions)."""
    with gistkern.patch_llama(model, num_gist_tokens=3, sink_tokens=2) as handle, torch.no_grad():
        gists = torch.tensor(handle.gist_token_ids).expand(2, -1)
        parts = [random_ids(2, 9, 1), gists, random_ids(2, 4, 2), gists, random_ids(2, 6, 3)]
        stream = torch.cat(parts, 1)
        full = model(stream).logits
        cache = gistkern.GistCache()
        pieces = [model(piece, past_key_values=cache).logits for piece in stream.split(chunk, 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), full, **TOLERANCE)
        assert cache.gist_rows.tolist() == [8, 8]
        assert cache.tail_rows.tolist() == [6, 6], "the raw rows of ended segments are gone"


def test_gist_first_refuses_gists_that_come_late(model):
    with gistkern.patch_llama(model, positions="gist_first") as handle, torch.no_grad():
        cache = gistkern.GistCache()
        model(random_ids(1, 5), past_key_values=cache)
        with pytest.raises(ValueError, match="raw tokens and its gist tokens in one call"):
            model(torch.tensor([handle.gist_token_ids]), past_key_values=cache)


@pytest.mark.parametrize("positions", ["absolute", "gist_first"])
def test_swapped_caches_swap_the_answers(model, positions):
    with gistkern.patch_llama(model, num_gist_tokens=3, positions=positions), torch.no_grad():
        first, second = (gistkern.compress(model, random_ids(1, 30, seed)) for seed in (5, 6))
        both = gistkern.compress(model, torch.cat([random_ids(1, 30, 5), random_ids(1, 30, 6)]))
        tail = random_ids(1, 4)
        answers = [model(tail, past_key_values=cache).logits for cache in (first, second)]
        assert (answers[0] - answers[1]).abs().max() > 1e-3
        both.batch_select_indices(torch.tensor([1, 0]))
        swapped = model(tail.expand(2, -1), past_key_values=both).logits
        torch.testing.assert_close(swapped, torch.cat(answers[::-1]), **TOLERANCE)


def test_no_gradient_reaches_the_context_past_detached_gists(model, monkeypatch):
    """The leak test: with the gist rows detached, the answer's loss has exactly zero gradient in the context."""
    from gistkern.ops import attention, library

    original = library.compact
    with gistkern.patch_llama(model, num_gist_tokens=3, sink_tokens=1) as handle:
        stream = torch.cat([random_ids(1, 20), torch.tensor([handle.gist_token_ids]), random_ids(1, 5, 7)], 1)
        layout = GistLayout.from_input_ids(stream, handle.gist_token_ids)

        def context_gradient():
            from gistkern.hf.call import embed

            embeds = embed(handle, stream, handle.is_gist(stream)).detach().requires_grad_()
            model(inputs_embeds=embeds, gist_layout=layout, use_cache=False).logits[0, -3:].square().sum().backward()
            return embeds.grad[0]

        assert (context_gradient()[:20] != 0).any(), "through the gist rows the context is trained"
        monkeypatch.setattr(attention, "needs_operators", lambda *call: True)  # the rows pass between two operators
        monkeypatch.setattr(library, "compact", lambda *call: tuple(rows.detach() for rows in original(*call)))
        gradient = context_gradient()
        assert (gradient[:23] == 0).all()
        assert (gradient[23:] != 0).any()
