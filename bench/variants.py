"""Tiles of Hopper's forward that are compiled and may be timed: by bench/compiled/hopper.py and bench/gpu/hopper.py."""

from typing import NamedTuple

from gistkern.kernels import configs


class Variant(NamedTuple):
    """A tile of the forward: head dimension, columns, stages."""

    head_dim: int
    block_cols: int
    num_stages: int

    @property
    def ships(self) -> bool:
        """Whether it is the one that calls take."""
        row = configs.HOPPER["fwd", self.head_dim]
        return (row.block_cols, row.num_stages) == self[1:]


VARIANTS = (
    *(Variant(64, 64, 4), Variant(64, 128, 4)),
    *(Variant(128, 64, 3), Variant(128, 64, 4), Variant(128, 128, 2), Variant(128, 128, 3)),
)
