"""Packed documents, as collators without padding mark them: positions that begin again, or `cu_seq_lens`."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["check_positions", "packed_documents"]


def packed_documents(arguments: dict[str, Any], shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    """bool ``[B, N]``: the first token of each document of a call; None for one document per sample.

    As in transformers, positions pack documents only where there is no attention mask.

    Raises
    ------
    ValueError
        If `cu_seq_lens_q` does not end each document where the next begins, or disagrees with the positions.
    """
    by_length = _by_length(arguments.get("cu_seq_lens_q"), shape, device)
    positions = arguments.get("position_ids")
    if positions is None or arguments.get("attention_mask") is not None:
        return by_length
    starts = positions.to(device).expand(shape) == 0
    counted = positions.to(device).expand(shape).diff(dim=1) == 1
    several, regular = torch.stack([starts.sum() > len(starts), (starts[:, 1:] | counted).all() & starts[:, 0].all()])
    if not bool(several & regular):
        return by_length
    if by_length is not None and not torch.equal(by_length, starts):
        raise ValueError("cu_seq_lens_q and position_ids disagree about where documents begin: pass one of them")
    return starts


def _by_length(ends: torch.Tensor | None, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
    if ends is None:
        return None
    places = torch.as_tensor(ends).tolist()
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
    given = given.to(real.device)
    same = [((given == guess) | ~real).all() for guess in guesses]
    if not bool(torch.stack(same).any()):
        raise ValueError(
            "position_ids are set by the position scheme, and would be ignored: leave them out; for positions of your "
            "own pass them together with gist_layout. Packed documents count from 0 each, without an attention_mask "
            "and without a cache (or come as GistLayout.pack)"
        )
