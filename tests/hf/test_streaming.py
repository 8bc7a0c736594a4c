"""Random ragged streams: whatever the calls, every token sees what the full masked forward lets it see."""

import pytest
import torch
from conftest import make_model, random_ids
from hypothesis import given
from hypothesis import strategies as st

import gistkern
from gistkern import GistLayout

MODEL = make_model(num_hidden_layers=2, hidden_size=32, intermediate_size=32)
PAD = 0


@st.composite
def ragged_streams(draw):
    """Per sample a list of pieces (some empty) of raw (1..9) and gist (100, 101) tokens."""
    samples, calls = draw(st.integers(2, 3)), draw(st.integers(2, 6))
    token = st.one_of(st.integers(1, 9), st.sampled_from([100, 101]))
    piece = st.lists(token, min_size=0, max_size=4)
    return [[draw(piece) for _ in range(calls)] for _ in range(samples)], draw(st.sampled_from(["left", "right"]))


@given(ragged_streams(), st.sampled_from([0, 1, 2, 5]))
def test_ragged_calls_equal_the_full_forward(streams, sink_tokens):
    pieces, side = streams
    with gistkern.patch_llama(MODEL, num_gist_tokens=2, sink_tokens=sink_tokens), torch.no_grad():
        cache, got = gistkern.GistCache(), [[] for _ in pieces]
        for call in zip(*pieces, strict=True):
            width = max(map(len, call))
            if not width:
                continue
            ids, mask = torch.full((len(call), width), PAD), torch.zeros(len(call), width, dtype=torch.long)
            for row, tokens in enumerate(call):
                place = slice(width - len(tokens), width) if side == "left" else slice(0, len(tokens))
                ids[row, place], mask[row, place] = torch.tensor(tokens, dtype=torch.long), 1
            logits = MODEL(ids, attention_mask=mask, past_key_values=cache).logits
            for row in range(len(call)):
                got[row].append(logits[row][mask[row] == 1])
        for row, sample in enumerate(pieces):
            stream = [token for piece in sample for token in piece]
            if not stream:
                continue
            full = MODEL(torch.tensor([stream]), use_cache=False).logits[0]
            torch.testing.assert_close(torch.cat(got[row]), full, rtol=0, atol=1e-12)
            assert cache.state.seen[row] == len(stream)


@pytest.mark.parametrize("positions", ["absolute", "gist_first"])
def test_decoding_after_an_explicit_layout(positions):
    """Stacked, packed and plain layouts given by hand leave a cache that goes on as the full stream would."""
    parts = [GistLayout.from_segments([20], 2, tail=4), GistLayout.from_segments([5], 2, tail=3)]
    with gistkern.patch_llama(MODEL, num_gist_tokens=2, positions=positions) as handle, torch.no_grad():
        gists = torch.tensor(handle.gist_token_ids)
        streams = [
            torch.cat([random_ids(1, n, n)[0] % 10, gists, random_ids(1, t, t)[0] % 10]) for n, t in ((20, 4), (5, 3))
        ]
        new = torch.tensor([[7]])
        expected = [MODEL(torch.cat([s, new[0]])[None], use_cache=False).logits[0, -1] for s in streams]

        def following(ids, layout, batch):
            cache = gistkern.GistCache()
            MODEL(ids, gist_layout=layout, past_key_values=cache)
            return MODEL(new.expand(batch, 1), past_key_values=cache).logits[:, -1]

        close = {"rtol": 0, "atol": 1e-12}
        torch.testing.assert_close(following(streams[0][None], parts[0], 1)[0], expected[0], **close)
        torch.testing.assert_close(
            following(torch.cat(streams)[None], GistLayout.pack(parts), 1)[0], expected[1], **close
        )
        for side in ("left", "right"):
            ids = torch.nn.utils.rnn.pad_sequence(streams, batch_first=True, padding_side=side)
            both = following(ids, GistLayout.stack(parts, side), 2)
            torch.testing.assert_close(both, torch.stack(expected), **close)


def test_a_sliding_layout_must_be_given_again():
    with gistkern.patch_llama(MODEL, num_gist_tokens=1) as handle, torch.no_grad():
        ids = random_ids(1, 12) % 10
        layout = GistLayout.sliding(12, 5, 3)
        ids[layout.is_gist] = handle.gist_token_ids[0]
        cache = gistkern.GistCache()
        MODEL(ids, gist_layout=layout, past_key_values=cache)
        with pytest.raises(ValueError, match="pass gist_layout with every call"):
            MODEL(torch.tensor([[7]]), past_key_values=cache)


def test_late_gists_are_found_behind_padding_too():
    with gistkern.patch_llama(MODEL, num_gist_tokens=1, positions="gist_first"), torch.no_grad():
        cache = gistkern.GistCache()
        MODEL(torch.tensor([[5, 6], [7, 8]]), past_key_values=cache)
        with pytest.raises(ValueError, match="raw tokens and its gist tokens in one call"):
            MODEL(
                torch.tensor([[0, 0, 100], [9, 9, 9]]),
                attention_mask=torch.tensor([[0, 0, 1], [1, 1, 1]]),
                past_key_values=cache,
            )
