"""Every compression scheme of the field: one function per constructor of `GistLayout`, which takes what they return.

`from_roles` is the common core: it turns "which token is a gist, a sink, a segment start" into intervals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gistkern.layout import arrays, positions
from gistkern.layout.arguments import check_count, check_padding, check_segments, counts_of, ints, token_ids
from gistkern.layout.fields import LayoutFields
from gistkern.layout.plain import marked
from gistkern.layout.roles import gather_list, roles_of_segments

__all__ = ["decode", "decode_rows", "from_input_ids", "from_roles", "from_segments", "hierarchical", "sliding"]


def from_roles(
    is_gist: arrays.Vectors,
    valid: arrays.Vectors,
    *,
    sink_tokens: int,
    starts: arrays.Vectors | None = None,
    past: int = 0,
    past_rows: arrays.Vectors | None = None,
    seen: arrays.Vectors | None = None,
    documents: arrays.Vectors | None = None,
) -> LayoutFields:
    """Layout of a batch of documents, from the role of each token: of tensors, or all of it of numpy arrays.

    Parameters
    ----------
    is_gist, valid : Tensor or ndarray
        bool ``[B, N]``; the valid tokens of a sample are contiguous.
    sink_tokens : int
        First real tokens of the document that stay visible.
    starts : Tensor, optional
        bool ``[B, N]``, first token of each segment; by default a segment starts after a run of gists.
    past, past_rows : int, Tensor, optional
        Columns of the past buffer, and how many of them each sample owns (int64 ``[B]``), right-aligned.
    seen : Tensor, optional
        int64 ``[B]``: tokens of the document that came before this call (they may have been its sinks).
    documents : Tensor, optional
        bool ``[B, N]``: the first token of each document where a sample packs several. None of them sees another.
    """
    batch, rows = is_gist.shape
    index = arrays.places(rows, is_gist)[None]
    is_gist = is_gist & valid
    previous_gist = arrays.shifted(is_gist)
    rank = positions.stream(valid)
    if documents is not None:
        # of the document that a token is in
        begins = arrays.running_max(arrays.where(documents & valid, index, 0))
        rank = arrays.where(valid, rank - arrays.taken(rank, begins), 0)
    if starts is None:
        starts = valid & ((previous_gist & ~is_gist) | (rank == 0))  # rank 0 begins a document
    segment_start = arrays.running_max(arrays.where(starts, index, 0))
    age = rank if seen is None else rank + seen[:, None]
    persistent = valid & (is_gist | (age < sink_tokens))

    owned = arrays.filled(batch, past, is_gist) if past_rows is None else past_rows
    first = (past - owned)[:, None]
    total = persistent.sum(1)
    before = arrays.int64(persistent).cumsum(1) - arrays.int64(persistent)  # persistent tokens in front of each
    gist_begin = first if documents is None else arrays.taken(before, begins)
    started = arrays.int64(valid).cumsum(1) > 0
    # padding rows hold empty intervals at places that keep the vectors monotone
    padding_edge = arrays.where(started, (past + total)[:, None], first)
    gist_begin = arrays.where(valid, gist_begin, padding_edge)
    gist_end = arrays.where(valid, past + arrays.taken(before, segment_start), padding_edge)
    local_begin = arrays.where(valid, segment_start, index + 1)

    last = arrays.largest(index * valid)
    has_rows = valid.any(1)
    # nothing is hidden where every row sees the first one: local_begin of padding lies behind it
    gather, plain = gather_list(persistent, None if past else (local_begin == 0).all())
    fields = LayoutFields(
        gist_begin=arrays.int32(gist_begin),
        gist_end=arrays.int32(gist_end),
        local_begin=arrays.int32(local_begin),
        gather=gather,
        is_gist=is_gist,
        stream_position=rank,
        gist_first_position=positions.gist_first(is_gist, valid, starts, documents=documents),
        keep_begin=arrays.where(has_rows, arrays.taken(gist_begin, last)[:, 0], first[:, 0]),
        keep_end=arrays.where(has_rows, arrays.taken(gist_end, last)[:, 0], past),
        keep_local=arrays.where(has_rows, arrays.taken(segment_start, last)[:, 0], rows),
        past=past,
    )
    return marked(fields, plain)


def from_input_ids(
    input_ids: torch.Tensor,
    gist_token_ids: Sequence[int] | torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    sink_tokens: int = 1,
    past: int | torch.Tensor = 0,
) -> LayoutFields:
    """Read the segments off the ids: a run of gist tokens followed by another token ends a segment.

    Parameters
    ----------
    input_ids : Tensor
        Integer ``[B, N]``.
    gist_token_ids : sequence of int
        The ids of the gist tokens.
    attention_mask : Tensor, optional
        ``[B, N]``, nonzero for real tokens. Padding may stand left, right or on both sides.
    sink_tokens : int
        So many first real tokens of the document stay visible for ever (the attention sink of
        Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks").
    past : int or Tensor
        Compact rows that come with the call; an int ``[B]`` tensor where samples own different
        numbers of them (then they stand right-aligned in a buffer of ``past.max()`` rows).
        With past rows the call continues a document, so it has no sink of its own.

    Raises
    ------
    ValueError
        On a wrong shape or dtype, no or repeated gist ids, a mask with holes, a negative count.

    Examples
    --------
    >>> from gistkern import GistLayout
    >>> ids = torch.tensor([[5, 6, 9, 7, 8]])
    >>> GistLayout.from_input_ids(ids, [9], sink_tokens=0).token_mask()[0, 3].tolist()
    [False, False, True, True, False]
    """
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"input_ids must be an integer tensor [batch, tokens], got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    if not input_ids.numel():
        raise ValueError(f"input_ids must hold at least one token, got {tuple(input_ids.shape)}")
    ids = token_ids(gist_token_ids, input_ids.device)
    if len(ids.unique()) != len(ids) or ids.min() < 0:
        raise ValueError(f"gist_token_ids must be distinct and non-negative, got {ids.tolist()}")
    check_count("sink_tokens", sink_tokens)
    valid = check_padding(input_ids, attention_mask)
    is_gist = torch.isin(input_ids, ids)
    if not torch.is_tensor(past):
        check_count("past", past)
        return from_roles(is_gist, valid, sink_tokens=0 if past else sink_tokens, past=past)
    if past.shape != (len(input_ids),):
        raise ValueError(f"past must be an int, or non-negative ints [{len(input_ids)}], got {past!r}")
    owned = counts_of("past", past, input_ids.device)
    # a sample with past rows continues its document: all of its sinks have gone by
    seen = torch.where(owned > 0, sink_tokens, 0)
    columns = int(owned.max())
    return from_roles(is_gist, valid, sink_tokens=sink_tokens, past=columns, past_rows=owned, seen=seen)


def from_segments(
    lengths: Sequence[int],
    gists: int | Sequence[int],
    *,
    tail: int = 0,
    sink_tokens: int = 1,
    past: int = 0,
    device: torch.device | str = "cpu",
) -> LayoutFields:
    """One document of explicit segments: ``lengths[s]`` raw tokens, then ``gists`` (or ``gists[s]``) gists.

    `tail` raw tokens (the question and answer) follow the last segment. Batch size 1.

    Examples
    --------
    >>> from gistkern import GistLayout
    >>> print(GistLayout.from_segments([2, 1], gists=1, tail=1, sink_tokens=0).picture())
      g g
    █·····
    ██····
    ███···
    ··██··
    ··███·
    ··█·██
    """
    lengths = ints("lengths", lengths)
    counts = [gists] * len(lengths) if isinstance(gists, int) else ints("gists", gists)
    if len(counts) != len(lengths):
        raise ValueError(f"gists lists {len(counts)} segments, lengths lists {len(lengths)}")
    check_segments(lengths, counts)
    for name, value in (("tail", tail), ("sink_tokens", sink_tokens), ("past", past)):
        check_count(name, value)
    if not len(lengths) and not tail:
        raise ValueError("a layout needs at least one segment or tail row")
    is_gist, starts = roles_of_segments(lengths, counts, tail)
    return from_roles(
        is_gist.to(device),
        torch.ones_like(is_gist, device=device),
        sink_tokens=0 if past else sink_tokens,
        starts=starts.to(device),
        past=past,
    )


def sliding(
    n: int,
    window: int,
    stride: int,
    *,
    gists: int = 1,
    sink_tokens: int = 1,
    device: torch.device | str = "cpu",
) -> LayoutFields:
    """A local window over `n` rows in which every `stride` raw tokens are followed by `gists` gist tokens.

    A row sees the last `window` rows, itself included, and the gists (and sinks) older than that.
    Batch size 1.

    Examples
    --------
    >>> from gistkern import GistLayout
    >>> print(GistLayout.sliding(6, window=2, stride=2, gists=1, sink_tokens=0).picture())
      g  g
    █·····
    ██····
    ·██···
    ··██··
    ··███·
    ··█·██
    """
    for name, value in (("n", n), ("window", window), ("stride", stride), ("gists", gists)):
        check_count(name, value, least=1)
    check_count("sink_tokens", sink_tokens)
    index = torch.arange(n, device=device)[None]
    is_gist = index % (stride + gists) >= stride
    persistent = is_gist | (index < sink_tokens)
    window_start = (index - window + 1).clamp(min=0)
    before = torch.nn.functional.pad(persistent.long().cumsum(1), (1, 0))
    starts = index % (stride + gists) == 0
    keep_local = max(n - window + 1, 0)
    fields = LayoutFields(
        gist_begin=torch.zeros_like(index, dtype=torch.int32),
        gist_end=before.gather(1, window_start).int(),
        local_begin=window_start.int(),
        gather=gather_list(persistent)[0],
        is_gist=is_gist,
        stream_position=index.clone(),
        gist_first_position=positions.gist_first(is_gist, torch.ones_like(is_gist), starts),
        keep_begin=torch.zeros(1, dtype=torch.int64, device=device),
        keep_end=before[:, keep_local],
        keep_local=torch.full((1,), keep_local, device=device),
    )
    return marked(fields, n <= window)


def hierarchical(
    lengths: Sequence[int],
    segment_gists: int,
    summary_gists: int,
    *,
    tail: int = 0,
    see_earlier_gists: bool = False,
    sink_tokens: int = 1,
    device: torch.device | str = "cpu",
) -> LayoutFields:
    """Gists of gists: each segment writes `segment_gists`, then `summary_gists` see all of those.

    The `tail` rows, and every later call, see the sinks and the summary gists only. Segments see
    nothing outside themselves, or the earlier segments' gists with `see_earlier_gists`. Batch size 1.

    Examples
    --------
    >>> from gistkern import GistLayout
    >>> print(GistLayout.hierarchical([2, 2], 1, 1, tail=1, sink_tokens=0).picture())
      g  gg
    █·······
    ██······
    ███·····
    ···█····
    ···██···
    ···███··
    ··█··██·
    ······██
    """
    lengths = ints("lengths", lengths)
    check_segments(lengths, [segment_gists] * len(lengths))
    if not len(lengths):
        raise ValueError("a hierarchical layout needs at least one segment")
    for name, value, least in (("summary_gists", summary_gists, 1), ("tail", tail, 0), ("sink_tokens", sink_tokens, 0)):
        check_count(name, value, least)
    # level 1 alone: where its gists and sinks stand in the compact buffer, in stream order
    level1 = from_segments(lengths, segment_gists, sink_tokens=sink_tokens)
    body, level1_rows = level1.num_rows, level1.num_compact
    sinks = level1.gather[0][~level1.is_gist[0, level1.gather[0]]]
    # compact buffer: level 1, then the sinks once more, then the summary gists; the tail sees the last two
    summary = torch.arange(body, body + summary_gists)
    gather = torch.cat([level1.gather[0], sinks, summary])
    end = len(gather)

    def rows(first: torch.Tensor, of_summary: int, of_tail: int) -> torch.Tensor:
        parts = [first, torch.full((summary_gists,), of_summary), torch.full((tail,), of_tail)]
        return torch.cat(parts)[None]

    begin1 = level1.gist_begin[0]
    end1 = level1.gist_end[0] if see_earlier_gists else begin1  # empty, where the summary's interval starts
    offset = torch.arange(tail)
    level1_valid = torch.ones_like(level1.is_gist)
    _, starts = roles_of_segments(lengths, [segment_gists] * len(lengths), 0)
    place1 = positions.gist_first(level1.is_gist, level1_valid, starts, restart=not see_earlier_gists)[0]
    after1 = int(place1[level1.is_gist[0]].max()) + 1
    place_summary = after1 + torch.arange(summary_gists)
    fields = LayoutFields(
        gist_begin=rows(begin1, 0, level1_rows).int(),
        gist_end=rows(end1, level1_rows, end).int(),
        local_begin=rows(level1.local_begin[0], body, body + summary_gists).int(),
        gather=gather[None],
        is_gist=torch.cat([level1.is_gist[0], torch.ones(summary_gists).bool(), torch.zeros(tail).bool()])[None],
        stream_position=torch.arange(body + summary_gists + tail)[None],
        gist_first_position=torch.cat([place1, place_summary, after1 + summary_gists + offset])[None],
        keep_begin=torch.tensor([level1_rows]),
        keep_end=torch.tensor([end]),
        keep_local=torch.tensor([body + summary_gists]),
    )
    return fields.on(device)


def decode(
    past: int | torch.Tensor,
    tail: int | torch.Tensor = 0,
    *,
    rows: int = 1,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
) -> LayoutFields:
    """`rows` new raw rows that see all past rows and the tail: the layout of a decoding step.

    `past` and `tail` are int, or int ``[B]`` tensors of per-sample counts, right-aligned.

    Examples
    --------
    >>> from gistkern import GistLayout
    >>> GistLayout.decode(past=10, tail=5).dense().shape  # one new row over ten gist rows and a tail of five
    torch.Size([1, 1, 16])
    """
    check_count("rows", rows, least=1)
    for name, value in (("past", past), ("tail", tail)):
        if torch.is_tensor(value):
            batch_size = len(counts_of(name, value, device))
        else:
            check_count(name, value)
    check_count("batch_size", batch_size, least=1)
    owned, kept = (
        value.to(device, torch.int64)
        if torch.is_tensor(value)
        else torch.full((batch_size,), value, device=device, dtype=torch.int64)
        for value in (past, tail)
    )
    if owned.shape != kept.shape:
        raise ValueError(f"past lists {len(owned)} samples, tail lists {len(kept)}")
    past_columns = int(owned.max()) if torch.is_tensor(past) else past
    tail_columns = int(kept.max()) if torch.is_tensor(tail) else tail
    return decode_rows(owned, past_columns, kept, tail_columns, rows)


def decode_rows(
    owned: torch.Tensor, past_columns: int, kept: torch.Tensor, tail_columns: int, rows: int
) -> LayoutFields:
    """`decode` with the buffers' widths known, so that nothing waits for the device."""
    batch_size, device = len(owned), owned.device
    offset = torch.arange(rows, device=device).expand(batch_size, rows)
    first, start = past_columns - owned, tail_columns - kept
    fields = LayoutFields(
        gist_begin=first[:, None].expand(-1, rows).int(),
        gist_end=torch.full((batch_size, rows), past_columns, dtype=torch.int32, device=device),
        local_begin=start[:, None].expand(-1, rows).int(),
        gather=torch.empty(batch_size, 0, dtype=torch.int64, device=device),
        is_gist=torch.zeros(batch_size, rows, dtype=torch.bool, device=device),
        stream_position=offset.clone(),
        gist_first_position=offset.clone(),
        keep_begin=first,
        keep_end=torch.full_like(first, past_columns),
        keep_local=start,
        past=past_columns,
        tail=tail_columns,
    )
    return marked(fields, not past_columns and not tail_columns)
