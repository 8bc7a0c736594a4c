"""Which layers of a model have a sliding window, read off its config."""

from __future__ import annotations

from typing import Any

__all__ = ["Windows", "check_window", "layer_windows"]

# of each layer, how many of the last rows it sees; None for a layer with full attention
Windows = tuple[int | None, ...]


def layer_windows(config: Any) -> Windows:
    """The windows of a model's layers.

    Parameters
    ----------
    config : PreTrainedConfig
        With ``sliding_window``, and ``layer_types`` where layers differ (without them all have it).

    Raises
    ------
    ValueError
        For layers that are neither full nor sliding attention, or slide by no positive number of rows.
    """
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    if others := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise ValueError(
            f"the model has layers of type {', '.join(map(repr, others))}: gist tokens need attention in every layer, "
            "over all rows or a sliding window"
        )
    if "sliding_attention" in kinds and (type(window) is not int or window < 1):
        raise ValueError(f"the model has sliding layers, but sliding_window={window!r}, which must be at least 1")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_window(layer: int, patched: int | None, window: int | None) -> None:
    """Raise RuntimeError if a layer attends with another window than it was patched with."""
    if window != patched:
        raise RuntimeError(
            f"layer {layer} was patched with sliding_window={patched} and now attends with {window}: change the config "
            "before the model is made, and patch it then"
        )
