"""Host arithmetic of the launches: how heads are packed, how work is cut. Sizes only, so no device sync.

Pure Python without Triton: the launchers use it, and so does the work counter (bench/counted/work.py).
"""

from __future__ import annotations

from math import ceil

__all__ = [
    "DECODE_ROWS",
    "chunk_count",
    "decode_block_rows",
    "pack_heads",
    "pack_lanes",
    "padded",
    "section_heads",
    "split_count",
]

# calls with at most so many query rows per sequence go to the decode kernel
DECODE_ROWS = 8
# more query heads than this in one tile leave too few positions for the causal diagonal
MAX_PACK = 16
# Hopper's kernels stream a K/V head once for all query heads that share it, so they need not pack more than this
MAX_LANES_PACK = 8
# a split of the decode kernel below this many columns costs more in merging than it saves
UNSPLIT_COLUMNS = 512
SPLIT_COLUMNS = 256
# programs per multiprocessor that the compact columns are cut into: with the longest first, the last one to
# finish is then short against the whole (measured as balance by bench/counted/work.py)
PROGRAMS_PER_MULTIPROCESSOR = 8
MIN_CHUNK_ROWS = 256


def padded(head_dim: int) -> int:
    """Width of the tiles for a head dimension: the next power of two, at least 16 (a tensor core's depth)."""
    return max(16, 1 << (head_dim - 1).bit_length())


def pack_heads(group: int, block_rows: int) -> int:
    """How many query heads of one K/V head share a tile: the largest divisor of `group` that fits."""
    limit = min(MAX_PACK, block_rows)
    return max(size for size in range(1, limit + 1) if group % size == 0)


def pack_lanes(group: int) -> int:
    """How many query heads of one K/V head share the 64 lanes of a warpgroup: a power of two, since it divides 64."""
    return min(group & -group, MAX_LANES_PACK)


def section_heads(num_heads: int, head_bytes: int, l2_bytes: int) -> int:
    """How many heads run side by side: those whose keys and values fit in half of the L2 cache together."""
    return max(1, min(num_heads, l2_bytes // 2 // max(head_bytes, 1)))


def chunk_count(num_units: int, num_rows: int, multiprocessors: int) -> int:
    """Row chunks for each of `num_units` compact (column tile, head) pairs, enough to fill the device evenly."""
    if num_units == 0:
        return 1
    wanted = ceil(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors / num_units)
    return max(1, min(wanted, num_rows // MIN_CHUNK_ROWS))


def decode_block_rows(num_rows: int, pack: int) -> int:
    """Height of the decode kernel's one tile: all rows of a pack of heads, at least a tensor core's 16."""
    return max(16, 1 << (num_rows * pack - 1).bit_length())


def split_count(num_units: int, num_columns: int, multiprocessors: int) -> int:
    """Programs per (sequence, pack of heads) in decoding; `num_columns` bounds what any sequence sees."""
    if num_columns <= UNSPLIT_COLUMNS:
        return 1
    return max(1, min(ceil(2 * multiprocessors / num_units), ceil(num_columns / SPLIT_COLUMNS)))
