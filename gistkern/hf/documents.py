"""Packed documents, as collators without padding mark them: positions that begin again, `cu_seq_lens` or `seq_idx`."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["broadcast_positions", "check_positions", "packed_documents"]


def broadcast_positions(positions: Any, shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Positions ``[B, N]`` of a call; ValueError where they are no numbers or of another shape."""
    try:
        return torch.as_tensor(positions, device=device).expand(shape)
    except (TypeError, ValueError, RuntimeError) as error:
        found = tuple(positions.shape) if torch.is_tensor(positions) else type(positions).__name__
        raise ValueError(f"position_ids must be [batch, tokens] {tuple(shape)} or [1, tokens], got {found}") from error


def packed_documents(arguments: dict[str, Any], shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    """bool ``[B, N]``: the first token of each document of a call; None for one document per sample.

    As in transformers, positions pack documents only where there is no attention mask.

    Raises
    ------
    ValueError
        If `cu_seq_lens_q` does not end each document where the next begins, or they disagree with each other.
    """
    ends = arguments.get("cu_seq_lens_q")
    by_length = _by_length(arguments.get("cu_seq_lens_k") if ends is None else ends, shape, device)
    by_index = _by_index(arguments.get("seq_idx"), shape, device)
    if by_length is None or by_index is None:
        by_length = by_index if by_length is None else by_length
    elif not torch.equal(by_length, by_index):
        raise ValueError("cu_seq_lens_q and seq_idx disagree about where documents begin: pass one of them")
    positions = arguments.get("position_ids")
    if positions is None or arguments.get("attention_mask") is not None:
        return by_length
    starts = positions == 0
    counted = positions.diff(dim=1) == 1
    several, regular = torch.stack([starts.sum() > len(starts), (starts[:, 1:] | counted).all() & starts[:, 0].all()])
    if not bool(several & regular):
        return by_length
    if by_length is not None and not torch.equal(by_length, starts):
        raise ValueError(
            "cu_seq_lens_q (or seq_idx) and position_ids disagree about where documents begin: pass one of them"
        )
    return starts


def _by_index(index: torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    """Where `seq_idx` (a document's number at each of its tokens) changes; None where it never does."""
    if index is None:
        return None
    if not torch.is_tensor(index) or index.shape != shape:
        found = tuple(index.shape) if torch.is_tensor(index) else type(index).__name__
        raise ValueError(f"seq_idx must be [batch, tokens] {tuple(shape)}, got {found}")
    changes = index.to(device).diff(dim=1) != 0
    return torch.nn.functional.pad(changes, (1, 0), value=True) if bool(changes.any()) else None


def _by_length(ends: Any, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    if ends is None:
        return None
    try:
        places = torch.as_tensor(ends).reshape(-1).tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"cu_seq_lens_q must be a tensor of ints, got {type(ends).__name__}") from error
    rising = places == sorted(places) and places[:1] == [0] and places[-1] == shape[1]
    if shape[0] != 1 or not rising:
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the {shape[1]} tokens of a single row, got {places} for {shape[0]} rows"
        )
    begins = sorted(set(places[:-1]) - {shape[1]})
    if len(begins) < 2:
        return None
    starts = torch.zeros(shape, dtype=torch.bool, device=device)
    starts[:, begins] = True
    return starts


def check_positions(given: torch.Tensor | None, guesses: list[torch.Tensor], real: torch.Tensor) -> None:
    """Raise ValueError unless positions are a usual guess of what the position scheme sets anyway.

    `given` and the guesses broadcast to `real`, bool ``[B, N]``: the tokens that are no padding.
    """
    if given is None:
        return
    same = [((given == guess) | ~real).all() for guess in guesses]
    if not bool(torch.stack(same).any()):
        raise ValueError(
            "position_ids are set by the position scheme, and would be ignored: leave them out; for positions of your "
            "own pass them together with gist_layout. Packed documents count from 0 each, without an attention_mask "
            "and without a cache (or come as GistLayout.pack)"
        )
