"""Many contexts in one row that have segments in common: each segment is read once, by whoever is made of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gistkern.layout.arguments import check_count, ints
from gistkern.layout.fields import LayoutFields
from gistkern.layout.schemes import hierarchical

__all__ = ["shared_segments"]


def shared_segments(
    lengths: Sequence[int],
    members: Sequence[Sequence[int]],
    segment_gists: int,
    summary_gists: int,
    *,
    tail: int = 0,
    sink_tokens: int = 1,
    device: torch.device | str = "cpu",
) -> LayoutFields:
    """Hierarchical contexts that share segments, in one row: B long contexts that differ in one segment read S + B.

    Independent segments do not see one another, so one that several contexts have in common needs to be read once. The
    row holds every segment with its gists behind it, then for each context its summary gists and its tail. Each context
    lists the gists of its own segments in `gather` once more, side by side, and its summary sees that stretch alone.
    Batch size 1.

    Under ``gist_first`` positions the outputs of a context's tail are those of
    ``GistLayout.hierarchical([lengths[s] for s in members[b]], segment_gists, summary_gists, ...)`` in a row of its
    own; under ``absolute`` ones they are not, since a segment has one place in the row for all.

    Parameters
    ----------
    lengths : sequence of int
        Raw tokens of each segment of the row.
    members : sequence of sequences of int
        For each context its segments, in order.
    segment_gists, summary_gists, tail, sink_tokens : int
        As in `hierarchical`. A context's sinks are the first tokens of its first segment.

    Raises
    ------
    ValueError
        If there is no context; if one has no segment, one twice, or one that does not exist; if its first segment is
        shorter than `sink_tokens`; or for lengths and counts that `hierarchical` refuses.

    Examples
    --------
    Two contexts of two segments with the first in common, each closed by a summary gist and asked one token:

    >>> from gistkern import GistLayout
    >>> layout = GistLayout.shared_segments([2, 1, 1], [[0, 1], [0, 2]], 1, 1, tail=1, sink_tokens=0)
    >>> print(layout.picture())
      g g gg g
    █··········
    ██·········
    ███········
    ···█·······
    ···██······
    ·····█·····
    ·····██····
    ··█·█··█···
    ·······██··
    ··█···█··█·
    ·········██
    """
    lengths = ints("lengths", lengths)
    for name, value, least in (("summary_gists", summary_gists, 1), ("tail", tail, 0), ("sink_tokens", sink_tokens, 0)):
        check_count(name, value, least)
    contexts = _checked(lengths, members, sink_tokens)
    # the rows of the segments are those of segments that see nothing earlier, without what follows them
    body = hierarchical(lengths, segment_gists, 1, sink_tokens=0)
    rows = body.num_rows - 1
    gists = body.gather[0, :-1].view(len(lengths), segment_gists)
    firsts = gists[:, 0] - torch.tensor(lengths)
    # the contexts' rows, appended to the segments' ones
    gather: list[torch.Tensor] = []
    begin, end, start = [0] * rows, [0] * rows, body.local_begin[0, :rows].tolist()
    middle, last, row = 0, 0, rows
    for segments in contexts:
        sinks = firsts[segments[0]] + torch.arange(sink_tokens)
        seen = torch.cat([sinks, gists[segments].flatten()])
        kept = torch.cat([sinks, row + torch.arange(summary_gists)])
        gather += [seen, kept]
        at, middle = last, last + len(seen)
        last = middle + len(kept)
        begin += [at] * summary_gists + [middle] * tail
        end += [middle] * summary_gists + [last] * tail
        start += [row] * summary_gists + [row + summary_gists] * tail
        row += summary_gists + tail
    is_gist = torch.tensor(([True] * summary_gists + [False] * tail) * len(contexts))
    place = segment_gists + torch.arange(summary_gists + tail).repeat(len(contexts))
    fields = LayoutFields(
        gist_begin=torch.tensor([begin], dtype=torch.int32),
        gist_end=torch.tensor([end], dtype=torch.int32),
        local_begin=torch.tensor([start], dtype=torch.int32),
        gather=torch.cat(gather)[None],
        is_gist=torch.cat([body.is_gist[0, :rows], is_gist])[None],
        stream_position=torch.arange(row)[None],
        gist_first_position=torch.cat([body.gist_first_position[0, :rows], place])[None],
        # what may be seen later belongs to the last context
        keep_begin=torch.tensor([middle]),
        keep_end=torch.tensor([last]),
        keep_local=torch.tensor([row - tail]),
    )
    return fields.on(device)


def _checked(lengths: Sequence[int], members: Sequence[Sequence[int]], sink_tokens: int) -> list[list[int]]:
    if not len(members):
        raise ValueError("members lists no context: a shared row needs at least one")
    contexts = [ints(f"members[{place}]", segments) for place, segments in enumerate(members)]
    for place, segments in enumerate(contexts):
        if not segments or len(set(segments)) < len(segments):
            raise ValueError(f"context {place} needs at least one segment and none twice, got {segments}")
        if not 0 <= min(segments) <= max(segments) < len(lengths):
            raise ValueError(f"context {place} must name segments 0..{len(lengths) - 1}, got {segments}")
        if lengths[segments[0]] < sink_tokens:
            raise ValueError(
                f"the first segment of context {place} has {lengths[segments[0]]} tokens, "
                f"which must be at least the {sink_tokens} sink tokens"
            )
    return contexts
