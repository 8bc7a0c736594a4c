"""What context parallelism sends: counted while it runs, and by arithmetic beside ring attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Traffic", "count_traffic", "gist_bytes", "record", "ring_bytes"]


@dataclass(eq=False)  # nested counts are told apart by identity
class Traffic:
    """Bytes that this rank received, by kind: ``"gists"``, ``"halo"``, ``"logits"``, each also ``", gradients"``."""

    received: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self.received.values())


_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank receives for gist context parallelism within the block."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def record(kind: str, size: int) -> None:
    """Note that `size` bytes are received."""
    for traffic in _counting:
        traffic.received[kind] = traffic.received.get(kind, 0) + size


def gist_bytes(rows: int, ranks: int, kv_heads: int, head_dim: int, itemsize: int, grad_itemsize: int = 0) -> int:
    """Bytes that a rank receives per layer: keys and values of `rows` compact rows, of which every rank owns as many.

    With `grad_itemsize` those of the backward too: gradients of the rows that it owns, from every other rank.
    """
    per_row = 2 * kv_heads * head_dim * (itemsize + grad_itemsize)
    return rows * (ranks - 1) // ranks * per_row


def ring_bytes(rows: int, ranks: int, kv_heads: int, head_dim: int, itemsize: int, backward: bool = False) -> int:
    """What ring attention (Liu et al. 2023, "Ring Attention with Blockwise Transformers", section 3) receives.

    Per layer and rank: in the forward the keys and values of all other ranks pass by; in the backward they pass by
    once more, and their gradients with them.
    """
    per_row = 2 * kv_heads * head_dim * itemsize
    return rows * (ranks - 1) // ranks * per_row * (3 if backward else 1)
