"""The mask rule, against definitions that share no code with it."""

import copy
import pickle
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import GIST_IDS, documents, layouts, token_batches, unwindowed

from gistkern import GistLayout
from gistkern.layout.checks import check_intervals


def rule_of_design(ids, mask, sinks):
    """DESIGN section 7, token by token: i sees j iff both are real, j <= i, and one of three holds."""
    batch, rows = ids.shape
    seen = torch.zeros(batch, rows, rows, dtype=torch.bool)
    for b in range(batch):
        segment, segments, real = 0, [0] * rows, [i for i in range(rows) if mask[b, i]]
        for previous, i in pairwise(real):
            if ids[b, previous] in GIST_IDS and ids[b, i] not in GIST_IDS:
                segment += 1
            segments[i] = segment
        for i in real:
            for j in real:
                persistent = int(ids[b, j]) in GIST_IDS or j in real[:sinks]
                seen[b, i, j] = j <= i and (segments[i] == segments[j] or persistent)
    return seen


@given(token_batches(max_rows=30))
def test_from_input_ids_is_the_rule_of_the_design(batch):
    ids, mask, sinks = batch
    layout = GistLayout.from_input_ids(ids, GIST_IDS, mask, sinks)
    check_intervals(layout)
    assert torch.equal(layout.token_mask(), rule_of_design(ids, mask, sinks))


@given(layouts())
def test_every_constructor_gives_well_formed_intervals(layout):
    check_intervals(layout)


@given(layouts())
def test_dense_and_token_mask_agree(layout):
    """The compact columns of a row name exactly the tokens that token_mask adds to its local ones."""
    dense, tokens = layout.dense(), layout.token_mask()
    assert dense.shape == (layout.batch_size, layout.num_rows, layout.num_compact + layout.num_local)
    gathered = dense[..., layout.past : layout.num_compact]
    for b, i in torch.cartesian_prod(torch.arange(layout.batch_size), torch.arange(layout.num_rows)).tolist():
        local = set(dense[b, i, layout.num_compact :].nonzero().flatten().tolist())
        compact = layout.gather[b][gathered[b, i]].tolist()
        assert not local & set(compact), "a token is seen through both buffers"
        assert local | set(compact) == set(tokens[b, i].nonzero().flatten().tolist())


@given(st.lists(documents(), min_size=2, max_size=3))
def test_no_interval_crosses_a_packed_document(parts):
    mask = GistLayout.pack(parts).token_mask()[0]
    expected = torch.block_diag(*(part.token_mask()[0].int() for part in parts))
    assert torch.equal(mask.int(), expected)


@given(st.lists(documents(), min_size=1, max_size=3), st.sampled_from(["left", "right"]))
def test_stack_pads_and_changes_nothing_else(parts, side):
    stacked = GistLayout.stack(parts, side)
    for b, part in enumerate(parts):
        rows = slice(-part.num_rows, None) if side == "left" else slice(0, part.num_rows)
        assert torch.equal(stacked.token_mask()[b, rows, rows], part.token_mask()[0])
        assert stacked.token_mask()[b].sum() == part.token_mask()[0].sum()
        assert stacked.is_real()[b].sum() == part.num_rows


def hides_nothing(layout):
    if layout.tail or layout.dense()[..., : layout.num_compact].any():
        return False
    causal = torch.ones(layout.num_rows, layout.num_rows).tril().bool()
    return torch.equal(layout.dense()[..., layout.num_compact :], causal.expand(layout.batch_size, -1, -1))


@given(layouts())
def test_a_layout_is_plain_where_it_hides_nothing(layout):
    assert layout.plain == hides_nothing(layout)
    for other in (layout.closed(), layout.to("cpu"), layout.last_rows(layout.num_rows), layout.windowed(9999)):
        assert other.plain == layout.plain
    if not layout.past and not layout.tail:
        twice = GistLayout.stack([layout, layout])
        assert twice.plain == layout.plain
        assert not GistLayout.pack([layout, layout]).plain


@given(st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_each_constructor_knows_a_plain_layout(rows, gists, sinks, padded):
    """One segment with its gists, or raw tokens alone, made in every way; one padding token hides something."""
    ids = torch.tensor([[1] * rows + list(GIST_IDS[:gists])] * 2)
    mask = torch.ones_like(ids)
    mask[1, 0] = not padded
    read = GistLayout.from_input_ids(ids, GIST_IDS, mask, sinks)
    sliding = GistLayout.sliding(rows, rows, 3, sink_tokens=sinks)
    explicit = GistLayout.from_segments([rows] if gists else [], gists, tail=0 if gists else rows, sink_tokens=sinks)
    assert [read.plain, sliding.plain, explicit.plain] == [not padded, True, True]
    assert hides_nothing(read) == read.plain
    zeros = torch.zeros(2, dtype=torch.int64)
    assert GistLayout.decode(0, zeros, rows=rows, batch_size=2).plain
    assert not GistLayout.decode(0, zeros + 1, rows=rows).plain
    assert not explicit.windowed(1).plain or rows + gists == 1


def test_nobody_can_claim_that_a_layout_is_plain():
    """Not by an argument, not by `replace`, not by writing what was found before."""
    layout = GistLayout.from_segments([4], 2)
    with pytest.raises(TypeError, match="plain"):
        GistLayout(**vars(hand_made()), plain=True)
    assert not replace(layout, local_begin=layout.local_begin + 1).plain
    assert not hand_made().plain
    for twin in (copy.copy(layout), copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert not twin.plain, "its tensors count their writes anew"
        assert torch.equal(twin.token_mask(), layout.token_mask())
    for name in ("gist_begin", "gist_end", "local_begin"):
        written = GistLayout.from_segments([4], 2)
        getattr(written, name)[0, -1] = 2
        assert not written.plain
        assert not any(made.plain for made in (written.to("cpu"), written.closed(), GistLayout.pack([written])))
        exchanged = GistLayout.from_segments([4], 2)
        object.__setattr__(exchanged, name, getattr(written, name))
        assert not exchanged.plain
    layout.local_begin.numpy()[0, -1] = 2  # which no version counts
    with pytest.raises(ValueError, match="made as one that hides nothing"):
        check_intervals(layout)
    with torch.inference_mode():
        assert not GistLayout.from_segments([4], 2).plain


def test_segment_rows_see_their_segment_and_earlier_gists():
    layout = GistLayout.from_segments([3, 2], [2, 1], tail=2, sink_tokens=1)
    expected = [
        "x.........",
        "xx........",
        "xxx.......",
        "xxxx......",
        "xxxxx.....",
        "x..xxx....",
        "x..xxxx...",
        "x..xxxxx..",
        "x..xx..xx.",
        "x..xx..xxx",
    ]
    assert layout.picture().splitlines()[-10:] == [line.replace(".", "·").replace("x", "█") for line in expected]


def test_sliding_row_sees_its_window_and_older_gists():
    mask = GistLayout.sliding(12, window=3, stride=3, gists=1, sink_tokens=0).token_mask()[0]
    assert mask[10].nonzero().flatten().tolist() == [3, 7, 8, 9, 10]
    assert mask[2].nonzero().flatten().tolist() == [0, 1, 2]


@given(unwindowed(), st.integers(1, 80))
def test_a_window_limits_local_rows_and_nothing_else(layout, window):
    """Padding, past rows, packed documents and the rows of a tail included."""
    found = layout.windowed(window)
    check_intervals(found)
    columns = torch.arange(layout.num_local)
    near = columns > columns[layout.tail :, None] - window
    expected = layout.dense()
    expected[..., layout.num_compact :] &= near
    assert torch.equal(found.dense(), expected)
    assert torch.equal(found.is_real(), layout.is_real())
    untouched = {field.name for field in fields(layout)} - {"local_begin"}
    assert all(getattr(found, name) is getattr(layout, name) for name in untouched)


def test_a_window_wider_than_all_rows_is_the_layout_itself():
    layout = GistLayout.decode(5, 3, rows=2)
    assert layout.windowed(5) is layout
    assert layout.windowed(4) is not layout
    with pytest.raises(ValueError, match="window must be an int >= 1, got 0"):
        layout.windowed(0)


def test_hierarchical_ends_in_its_summary_and_sinks():
    layout = GistLayout.hierarchical([96] * 63, 8, 10, tail=4, sink_tokens=1)
    body = 63 * 104
    mask = layout.token_mask()[0]
    assert mask[-1].nonzero().flatten().tolist() == [0, *range(body, body + 14)]
    assert mask[104].nonzero().flatten().tolist() == [104], "segments are independent"
    assert mask[body].sum() == 63 * 8 + 1 + 1, "the summary sees every segment gist, the sink and itself"
    assert (layout.keep_end - layout.keep_begin).item() == 11
    assert mask.sum(-1).max() <= 63 * 8 + 1 + 10, "no row sees more than the gists and one segment"


def test_past_rows_are_owned_per_sample():
    layout = GistLayout.from_input_ids(torch.tensor([[1, 2], [1, 2]]), GIST_IDS, past=torch.tensor([3, 1]))
    assert layout.past == 3
    assert layout.dense()[:, 0, :3].tolist() == [[True] * 3, [False, False, True]]
    assert layout.gather.shape[1] == 0, "a continued document has no sink of its own"


def test_a_sample_without_past_rows_has_its_sink():
    layout = GistLayout.from_input_ids(torch.tensor([[1, 90, 2], [1, 90, 2]]), GIST_IDS, past=torch.tensor([2, 0]))
    assert layout.token_mask()[0, 2].tolist() == [False, True, True]
    assert layout.token_mask()[1, 2].tolist() == [True, True, True]


def test_last_rows_keep_their_view():
    whole = GistLayout.from_segments([5, 4], 2, tail=3)
    part = whole.last_rows(5)
    assert (part.tail, part.num_rows, part.num_local) == (whole.num_rows - 5, 5, whole.num_rows)
    assert torch.equal(part.token_mask(), whole.token_mask()[:, -5:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(3, dtype=torch.long)}, "input_ids must be an integer tensor"),
        ({"input_ids": torch.zeros(1, 3)}, "input_ids must be an integer tensor"),
        ({"gist_token_ids": []}, "non-empty list"),
        ({"gist_token_ids": [5, 5]}, "distinct and non-negative"),
        ({"gist_token_ids": [-1]}, "distinct and non-negative"),
        ({"attention_mask": torch.ones(1, 4)}, "like input_ids"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "padding between real tokens"),
        ({"sink_tokens": -1}, "sink_tokens must be an int >= 0"),
        ({"past": -2}, "past must be an int >= 0"),
        ({"past": torch.tensor([1, 2])}, "past must be an int, or"),
    ],
)
def test_from_input_ids_refuses(arguments, message):
    good = {"input_ids": torch.tensor([[1, 2, 3]]), "gist_token_ids": [9]}
    with pytest.raises(ValueError, match=message):
        GistLayout.from_input_ids(**{**good, **arguments})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GistLayout.from_segments([4, 0], 2), "segment 1 has 0 raw tokens"),
        (lambda: GistLayout.from_segments([4], 0), "segment 0 has 0 gist tokens"),
        (lambda: GistLayout.from_segments([4], [1, 2]), "gists lists 2 segments, lengths lists 1"),
        (lambda: GistLayout.from_segments([], 2), "at least one segment or tail row"),
        (lambda: GistLayout.sliding(0, 2, 2), "n must be an int >= 1"),
        (lambda: GistLayout.hierarchical([], 1, 1), "at least one segment"),
        (lambda: GistLayout.hierarchical([3], 1, 0), "summary_gists must be"),
        (lambda: GistLayout.decode(torch.tensor([1, 2]), torch.tensor([1])), "past lists 2 samples, tail lists 1"),
        (lambda: GistLayout.pack([]), "nothing to pack"),
        (lambda: GistLayout.stack([GistLayout.decode(3)]), "without past and tail rows"),
        (lambda: GistLayout.stack([GistLayout.sliding(4, 2, 2)], "up"), "padding_side"),
        (lambda: GistLayout.sliding(4, 2, 2).last_rows(5), "count must lie in 1..4"),
        (lambda: GistLayout.sliding(4, 2, 2).positions("rotated"), "unknown position scheme"),
    ],
)
def test_constructors_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def hand_made(**changes):

    return replace(GistLayout.from_segments([3, 3], 1, tail=2), **changes)


def int32(*values):
    return torch.tensor([values], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gist_end": int32(0, 0, 0, 0, 2, 1, 2, 2, 3, 3)}, "gist_end must not decrease"),
        ({"gist_end": int32(0, 0, 0, 0, 2, 2, 2, 2, 3, 9)}, "must not pass the 3 compact rows"),
        ({"gist_begin": int32(0, 0, 0, 0, 3, 3, 3, 3, 3, 3)}, "0 <= gist_begin <= gist_end"),
        ({"local_begin": int32(0, 0, 0, 0, 4, 4, 4, 4, 8, 11)}, "local_begin must lie in"),
        ({"local_begin": int32(0, 0, 0, 0, 0, 4, 4, 4, 8, 8)}, "both as a gist row and as a local row"),
        ({"gather": torch.tensor([[0, 0, 7]])}, "sees one token twice"),
        ({"gather": torch.tensor([[0, -1, 7]])}, "unfilled"),
        ({"gather": torch.tensor([[0, 3, 99]])}, "gather must list local rows"),
        ({"local_begin": int32(0, 0, 0, 0, 4, 4, 4, 4, 8, 10)}, "is padding and must see no gist rows"),
    ],
)
def test_check_intervals_finds_a_broken_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        check_intervals(hand_made(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gist_end": torch.zeros(1, 9, dtype=torch.int32)}, "gist_end must be torch.int32 of shape"),
        ({"local_begin": torch.zeros(1, 10)}, "local_begin must be torch.int32"),
        ({"past": -1}, "past must be a non-negative int"),
    ],
)
def test_a_layout_of_wrong_shapes_cannot_be_made(changes, message):
    with pytest.raises(ValueError, match=message):
        hand_made(**changes)


def test_png_picture(tmp_path):
    from gistkern.layout.picture import save_png

    save_png(GistLayout.from_segments([5, 4], 2, tail=3), tmp_path / "mask.png", title="a mask")
    assert (tmp_path / "mask.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="a text picture holds 120 tokens, the layout has 200"):
        GistLayout.sliding(200, 5, 5).picture()
