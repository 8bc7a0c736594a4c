"""Shards see what the whole context's layout says, are of equal work, and refuse what cannot be cut."""

import pytest
import torch
from parallel_cases import LAYOUTS, layout_of

from gistkern import GistLayout
from gistkern.distributed import count_traffic, row_work, split_layout
from gistkern.distributed.traffic import record
from gistkern.layout_checks import check_intervals


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
    with pytest.raises(ValueError, match="no row after 202 can begin shard 2 of 4"):
        split_layout(GistLayout.from_segments([400], 4), 4)


def test_counts_of_traffic_nest():
    with count_traffic() as outer:
        record("gists", 5)
        with count_traffic() as inner:
            record("gists", 2)
        record("halo", 1)
    assert (inner.received, inner.total) == ({"gists": 2}, 2)
    assert (outer.received, outer.total) == ({"gists": 7, "halo": 1}, 8)
