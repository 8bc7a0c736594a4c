"""How the SDPA backend cuts a layout into dense blocks: which rows go through one flash call together.

Three kinds of block, chosen from the row vectors alone:

- *segment*: rows with equal intervals, each seeing itself causally; several equal-length segments that see
  nothing outside themselves become one batched block;
- *tile*: a few rows with differing intervals (sliding windows, decoding), under a mask of one tile.

Nothing here grows with the product of rows and keys: a tile's mask is at most `TILE_ROWS` high.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

__all__ = ["TILE_ROWS", "Block", "plan"]

# one cache-friendly tile of queries; runs of equal intervals at least this long need no mask at all
TILE_ROWS = 64
SEGMENT_ROWS = 32


@dataclass(frozen=True)
class Block:
    """Rows ``[begin, end)`` of the samples ``batch``, seeing at most these gist rows and local rows.

    `repeat` > 1 stacks so many equal segments, which begin at ``begin`` and follow each other.
    `masked` blocks hold rows whose intervals differ; the others share theirs and are causal.
    """

    batch: slice
    begin: int
    end: int
    gist_begin: int
    gist_end: int
    local_begin: int
    repeat: int = 1
    masked: bool = False


def plan(intervals: Sequence[torch.Tensor], num_local: int) -> list[Block]:
    """Blocks that cover every non-empty row exactly once, in a fixed order; of gist_begin, gist_end and local_begin."""
    vectors = [t.numpy() for t in intervals]
    same = all((vector == vector[:1]).all() for vector in vectors)
    samples = [slice(0, len(vectors[0]))] if same else [slice(b, b + 1) for b in range(len(vectors[0]))]
    tail = num_local - intervals[0].shape[1]
    return [
        block
        for batch in samples
        for block in _plan_sample(
            batch, vectors[0][batch.start], vectors[1][batch.start], vectors[2][batch.start], tail
        )
    ]


def _plan_sample(batch: slice, begin: np.ndarray, end: np.ndarray, start: np.ndarray, tail: int) -> list[Block]:
    row = np.arange(tail, tail + len(begin))
    empty = (start > row) & (begin == end)
    changes = (np.diff(begin) != 0) | (np.diff(end) != 0) | (np.diff(start) != 0) | (np.diff(empty) != 0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(begin)]
    blocks: list[Block] = []
    short: list[int] = []  # first and last row of a stretch of short runs

    def flush() -> None:
        while short:
            first, last = short[0], min(short[0] + TILE_ROWS, short[1])
            rows = slice(first, last)
            blocks.append(
                Block(
                    batch,
                    first,
                    last,
                    int(begin[rows].min()),
                    int(end[rows].max()),
                    int(start[rows].min()),
                    masked=True,
                )
            )
            short[:] = [last, short[1]] if last < short[1] else []

    for first, last in pairwise(edges):
        if empty[first]:
            flush()
        elif last - first < SEGMENT_ROWS:
            short[:] = [short[0] if short else first, last]
        else:
            flush()
            block = Block(batch, first, last, int(begin[first]), int(end[first]), int(start[first]))
            if blocks and _extends(blocks[-1], block, tail):
                block = _extended(blocks.pop())
            blocks.append(block)
    flush()
    return blocks


def _extends(previous: Block, block: Block, tail: int) -> bool:
    """Whether `block` is one more segment like those of `previous`, alone and equally long."""
    length = block.end - block.begin
    alone = all(
        not one.masked and one.gist_begin == one.gist_end and one.local_begin == one.begin + tail
        for one in (previous, block)
    )
    return (
        alone
        and previous.end == block.begin
        and previous.batch == block.batch
        and (previous.end - previous.begin) == previous.repeat * length
    )


def _extended(block: Block) -> Block:
    length = (block.end - block.begin) // block.repeat
    return Block(
        block.batch,
        block.begin,
        block.end + length,
        block.gist_begin,
        block.gist_end,
        block.local_begin,
        block.repeat + 1,
    )
