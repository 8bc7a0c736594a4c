"""Shards see what the whole context's layout says, are of equal work, and refuse what cannot be cut."""

import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_cases import LAYOUTS, layout_of

from gistkern import GistLayout
from gistkern.distributed import count_traffic, row_work, shards, split_layout
from gistkern.distributed.collectives import record
from gistkern.layout.checks import check_intervals


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shards_see_what_the_whole_sees(name, parts):
    layout = layout_of(name)
    whole, compact = layout.dense(), layout.num_compact
    shards = split_layout(layout, parts)
    assert [shard.begin for shard in shards] + [layout.num_rows] == [0] + [shard.end for shard in shards]
    for shard in shards:
        check_intervals(shard.layout)
        seen = shard.layout.dense()
        assert torch.equal(seen[..., :compact], whole[:, shard.begin : shard.end, :compact])
        local = whole[:, shard.begin : shard.end, compact:]
        first = shard.begin - shard.halos[shard.rank]
        assert torch.equal(seen[..., compact:], local[..., first : shard.end])
        assert not local[..., :first].any()
        assert not local[..., shard.end :].any()
        for name_ in ("is_gist", "stream_position", "gist_first_position"):
            assert torch.equal(getattr(shard.layout, name_), shard.take(getattr(layout, name_)))


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_compact_row_is_found_where_its_owner_puts_it(name, parts):
    layout = layout_of(name)
    shards = split_layout(layout, parts)
    sent = torch.cat([torch.where(shard.own < 0, -1, shard.own + shard.begin) for shard in shards], 1)
    found = sent.gather(1, shards[0].place)
    assert torch.equal(torch.where(layout.gather < 0, -1, found), layout.gather)
    assert all(torch.equal(shard.place, shards[0].place) for shard in shards)
    assert sum(int((shard.own >= 0).sum()) for shard in shards) == int((layout.gather >= 0).sum())


def test_cuts_are_between_segments_where_segments_are_many():
    layout = GistLayout.from_segments([100] * 40, 8, tail=30)
    for parts in (2, 4, 8):
        shards = split_layout(layout, parts)
        assert not any(shards[0].halos)
        assert all((shard.begin) % 108 == 0 for shard in shards)
        # later rows see more gists, so later shards have fewer rows
        rows = [shard.end - shard.begin for shard in shards]
        assert rows[0] > rows[-1]
        mean = sum(shard.work for shard in shards) / parts
        heaviest = row_work(layout)[:-30].view(40, 108).sum(1).max()
        assert max(shard.work for shard in shards) < mean + heaviest, "cuts are not more than a segment off"


def test_work_is_visible_pairs_and_a_cost_per_row():
    layout = layout_of("ragged")
    pairs = layout.dense().sum((0, 2)).double()
    assert torch.equal(row_work(layout), pairs)
    assert torch.equal(row_work(layout, 7.5), pairs + 7.5 * layout.is_real().sum(0))
    equal = split_layout(GistLayout.from_segments([10] * 8, 2), 4, row_cost=1e9)
    assert [shard.end - shard.begin for shard in equal] == [24] * 4, "where rows cost most, shards have equal rows"


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="past or tail rows"):
        split_layout(GistLayout.decode(5, 2), 1)
    with pytest.raises(ValueError, match="3 rows cannot be split into 4 shards"):
        split_layout(GistLayout.from_segments([2], 1), 4)
    with pytest.raises(
        ValueError, match="cannot be cut into 4 shards whose local rows lie in themselves and the shard"
    ):
        split_layout(GistLayout.from_segments([400], 4), 4)


def lightest(layout, parts):
    """Work of the heaviest shard of the best split there is, over all of them; None if there is none."""
    reach, work = layout.local_begin.min(0).values.tolist(), [0.0, *row_work(layout).cumsum(0).tolist()]
    ends = {0: 0.0}
    for _ in range(parts - 1):
        further = {}
        for begin, heaviest in ends.items():
            for cut in range(begin + 1, layout.num_rows):
                if reach[cut] >= begin:
                    found = max(heaviest, work[cut] - work[begin])
                    further[cut] = min(found, further.get(cut, found))
        ends = further
    return min((max(heaviest, work[-1] - work[begin]) for begin, heaviest in ends.items()), default=None)


@pytest.mark.filterwarnings("ignore:the heaviest of")
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=6), st.integers(0, 9), st.integers(2, 6), st.sampled_from([0, 5])
)
def test_whatever_can_be_cut_is_cut_and_the_rest_is_refused(lengths, tail, parts, window):
    """Against every way to cut: a split exists exactly where one is found, and what greed misses is then the best."""
    layout = GistLayout.from_segments(lengths, 2, tail=tail)
    if window:
        layout = GistLayout.sliding(sum(lengths) + 10, window, 3)
    best = lightest(layout, parts)
    if best is None:
        with pytest.raises(ValueError, match=r"cannot be (cut|split) into"):
            split_layout(layout, parts)
        return
    cuts = [shard.begin for shard in split_layout(layout, parts)]
    assert all(layout.local_begin[0, cut] >= before for before, cut in itertools.pairwise(cuts))
    reach, total = layout.local_begin[0].numpy(), row_work(layout).cumsum(0).numpy()
    cuts = [0, *shards._smallest_bound(reach, total, parts), layout.num_rows]
    work = [0.0, *total]
    assert max(work[end] - work[begin] for begin, end in itertools.pairwise(cuts)) <= best * 1.002


def test_shards_that_others_wait_for_are_named():
    layout = GistLayout.from_segments([10, 10, 200], 2)
    with pytest.warns(UserWarning, match=r"the heaviest of 4 shards has 2.0 times the mean work"):
        split_layout(layout, 4)
    with warnings.catch_warnings(action="error"):
        split_layout(layout, 2)


def test_counts_of_traffic_nest():
    with count_traffic() as outer:
        record("gists", 5)
        with count_traffic() as inner:
            record("gists", 2)
        record("halo", 1)
    assert (inner.received, inner.total) == ({"gists": 2}, 2)
    assert (outer.received, outer.total) == ({"gists": 7, "halo": 1}, 8)
