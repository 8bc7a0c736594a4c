"""The mask rule: which rows see which keys, as two intervals per row (docs/concepts/mask.md). Needs torch alone."""

from gistkern.layout.layout import GistLayout

__all__ = ["GistLayout"]
