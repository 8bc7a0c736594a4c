"""Many contexts in one row that share their haystack: each sample adds only the segments that hold its needle.

Independent segments (`GistLayout.hierarchical`) are read without seeing each other, so a segment that several
contexts have in common needs to be read once. A token may stand in the layout's gather list as often as it is
wanted: each sample lists the gists of its segments there once more, side by side, and its own summary gists see
that stretch alone. A batch of B long contexts of S segments costs about S + B segments instead of B * S.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gistkern import GistLayout
from passkey.niah import Haystack

__all__ = ["cut", "needle_segments", "plain_segments", "shared_layout"]


def shared_layout(
    lengths: Sequence[int],
    members: Sequence[Sequence[int]],
    segment_gists: int,
    summary_gists: int,
    *,
    tail: int,
    sink_tokens: int = 0,
) -> GistLayout:
    """Layout of a row of segments that several samples are made of; batch size 1.

    The row holds every segment with its gists behind it, then for each sample its summary gists and its tail.
    Under ``gist_first`` positions the outputs of a sample's tail are those of
    ``GistLayout.hierarchical([lengths[s] for s in members[b]], ...)`` on a row of its own.

    Parameters
    ----------
    lengths : sequence of int
        Raw tokens of each segment of the row.
    members : sequence of sequences of int
        For each sample the segments of its context, in order.
    segment_gists, summary_gists, tail, sink_tokens : int
        As in `GistLayout.hierarchical`. A sample's sinks are the first tokens of its first segment.

    Raises
    ------
    ValueError
        If there is no sample, a sample has no segment or one twice, or its first is shorter than `sink_tokens`.
    """
    if not members:
        raise ValueError("members lists no sample: a shared row needs at least one")
    for sample, segments in enumerate(members):
        if not segments or len(set(segments)) < len(segments):
            raise ValueError(f"sample {sample} needs at least one segment and none twice, got {list(segments)}")
        if lengths[segments[0]] < sink_tokens:
            raise ValueError(
                f"the first segment of sample {sample} has {lengths[segments[0]]} tokens, "
                f"which must be at least the {sink_tokens} sink tokens"
            )
    # the rows of the segments are those of segments that see nothing earlier, without what follows them
    body = GistLayout.hierarchical(lengths, segment_gists, 1, sink_tokens=0)
    rows = body.num_rows - 1
    gists = body.gather[0, :-1].view(len(lengths), segment_gists)
    firsts = gists[:, 0] - torch.tensor(lengths)
    # the samples' rows, appended to the segments' ones
    gather: list[torch.Tensor] = []
    begin, end, start = [0] * rows, [0] * rows, body.local_begin[0, :rows].tolist()
    at, row = 0, rows
    for segments in members:
        sinks = firsts[segments[0]] + torch.arange(sink_tokens)
        seen = torch.cat([sinks, gists[list(segments)].flatten()])
        kept = torch.cat([sinks, row + torch.arange(summary_gists)])
        gather += [seen, kept]
        middle, last = at + len(seen), at + len(seen) + len(kept)
        begin += [at] * summary_gists + [middle] * tail
        end += [middle] * summary_gists + [last] * tail
        start += [row] * summary_gists + [row + summary_gists] * tail
        at, row = last, row + summary_gists + tail
    is_gist = torch.tensor(([True] * summary_gists + [False] * tail) * len(members))
    place = segment_gists + torch.arange(summary_gists + tail).repeat(len(members))
    return GistLayout(
        gist_begin=torch.tensor([begin], dtype=torch.int32),
        gist_end=torch.tensor([end], dtype=torch.int32),
        local_begin=torch.tensor([start], dtype=torch.int32),
        gather=torch.cat(gather)[None],
        is_gist=torch.cat([body.is_gist[0, :rows], is_gist])[None],
        stream_position=torch.arange(row)[None],
        gist_first_position=torch.cat([body.gist_first_position[0, :rows], place])[None],
        keep_begin=torch.tensor([middle]),
        keep_end=torch.tensor([last]),
        keep_local=torch.tensor([row - tail]),
    )


def cut(ids: Sequence[int], length: int, overlap: int) -> list[tuple[int, int]]:
    """(begin, end) of the segments that `gistkern.compress` cuts a context into."""
    last = max(1, len(ids) - overlap)
    return [(begin, min(begin + length, len(ids))) for begin in range(0, last, length - overlap)]


def plain_segments(haystack: Haystack, count: int, length: int, overlap: int) -> list[list[int]]:
    """`count` consecutive segments of a haystack without a needle; the last is of any length that a cut leaves."""
    step = length - overlap
    ids, _ = _plain(haystack, (count - 1) * step + haystack.rng.randint(overlap + 1, length))
    return [ids[begin:end] for begin, end in cut(ids, length, overlap)]


def needle_segments(haystack: Haystack, length: int, overlap: int) -> tuple[list[list[int]], str]:
    """The segments of some context that hold any token of its needle, and the key."""
    rng = haystack.rng
    key = haystack.key()
    needle = haystack.encode(" " + rng.choice(haystack.language.needles).format(key=key))
    filler, starts = _plain(haystack, rng.randint(length // 4, 3 * length))
    at = rng.choice(starts)
    ids = filler[:at] + needle + filler[at:]
    touching = [ids[begin:end] for begin, end in cut(ids, length, overlap) if begin < at + len(needle) and at < end]
    return touching, key


def _plain(haystack: Haystack, tokens: int) -> tuple[list[int], list[int]]:
    """Ids of `tokens` tokens of haystack, and the places between its sentences."""
    ids: list[int] = []
    starts: list[int] = []
    while len(ids) < tokens:
        starts.append(len(ids))
        ids += haystack.line()[1]
    return ids[:tokens], [*starts, tokens]
