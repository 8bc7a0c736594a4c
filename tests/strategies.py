"""Hypothesis strategies: random layouts of every scheme, padding side, packing, past and decode rows."""

import torch
from hypothesis import strategies as st

from gistkern import GistLayout

GIST_IDS = (90, 91, 92)


@st.composite
def token_batches(draw, max_rows=60):
    """(input_ids, attention_mask, sink_tokens): random ids with runs of gists, padded on either side."""
    batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, max_rows))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (batch, rows), generator=generator)
    gist = torch.rand(batch, rows, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.3, 0.8]))
    which = torch.randint(0, len(GIST_IDS), (batch, rows), generator=generator)
    ids = torch.where(gist, torch.tensor(GIST_IDS)[which], ids)
    mask = torch.ones(batch, rows, dtype=torch.long)
    for sample in range(batch):
        left = draw(st.integers(0, rows))
        right = draw(st.integers(0, rows - left))
        mask[sample, :left] = 0
        mask[sample, rows - right :] = 0
    return ids, mask, draw(st.integers(0, 4))


@st.composite
def documents(draw):
    """A layout of one document without past rows, of any scheme."""
    scheme = draw(st.sampled_from(["segments", "sliding", "hierarchical", "shared"]))
    sinks = draw(st.integers(0, 3))
    if scheme == "sliding":
        return GistLayout.sliding(
            draw(st.integers(1, 150)),
            draw(st.integers(1, 40)),
            draw(st.integers(1, 20)),
            gists=draw(st.integers(1, 3)),
            sink_tokens=sinks,
        )
    lengths = draw(st.lists(st.integers(1, 45), min_size=1, max_size=5))
    if draw(st.booleans()):  # equal segments take the batched path of the CPU backend
        lengths = [lengths[0]] * len(lengths)
    tail = draw(st.integers(0, 9))
    if scheme == "segments":
        return GistLayout.from_segments(lengths, draw(st.integers(1, 5)), tail=tail, sink_tokens=sinks)
    gists = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if scheme == "shared":
        places = range(len(lengths))
        contexts = st.lists(st.sampled_from(places), min_size=1, max_size=len(places), unique=True)
        members = draw(st.lists(contexts, min_size=1, max_size=3))
        sinks = min(sinks, *(lengths[segments[0]] for segments in members))
        return GistLayout.shared_segments(lengths, members, *gists, tail=tail, sink_tokens=sinks)
    return GistLayout.hierarchical(
        lengths,
        *gists,
        tail=tail,
        see_earlier_gists=draw(st.booleans()),
        sink_tokens=sinks,
    )


@st.composite
def layouts(draw):
    """Any layout: one document, a pack, a ragged stack, ids with past rows, or decoding rows; perhaps with a window."""
    layout = draw(unwindowed())
    window = draw(st.sampled_from([None, None, 1, 2, 7, 30]))
    return layout if window is None else layout.windowed(window)


@st.composite
def unwindowed(draw):
    """Any layout but those of layers with a sliding window."""
    kind = draw(st.sampled_from(["one", "pack", "stack", "ids", "decode", "rows"]))
    if kind == "one":
        return draw(documents())
    if kind == "pack":
        return GistLayout.pack(draw(st.lists(documents(), min_size=1, max_size=3)))
    if kind == "stack":
        return GistLayout.stack(
            draw(st.lists(documents(), min_size=1, max_size=3)), draw(st.sampled_from(["left", "right"]))
        )
    if kind == "rows":
        layout = draw(documents())
        return layout.last_rows(draw(st.integers(1, layout.num_rows)))
    if kind == "decode":
        batch = draw(st.integers(1, 3))
        past, tail = (torch.tensor([draw(st.integers(0, 40)) for _ in range(batch)]) for _ in range(2))
        return GistLayout.decode(past, tail, rows=draw(st.integers(1, 5)))
    ids, mask, sinks = draw(token_batches())
    past = draw(st.sampled_from([0, 7, torch.randint(0, 9, (len(ids),))]))
    return GistLayout.from_input_ids(ids, GIST_IDS, mask, sinks, past)
