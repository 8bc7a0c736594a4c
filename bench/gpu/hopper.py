"""Times Hopper's own kernels beside the plain ones: the forward in each tile that is compiled in, then both passes.

    python -m bench.gpu.hopper       # on an H100 or H200; two minutes, estimated. Some of it is a stage of `make gpu`

What it prints last are rows for `HOPPER` in kernels/configs.py. No GPU has run it; ttsem has, where times mean nothing.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.measured.timing import spent
from bench.shapes import layout_of
from bench.variants import VARIANTS, Variant
from gistkern import GistLayout, gist_attention
from gistkern.backends.hopper import ENVIRONMENT
from gistkern.kernels import configs
from gistkern.testing import make_inputs

NAMES = ("one segment", "1024/128", "512/8", "hierarchical")
ROWS, HEADS, ROUNDS = 16384, (32, 8), 5


class Timed(NamedTuple):
    """Milliseconds of a forward by each variant; None is the plain kernel."""

    layout: str
    head_dim: int
    milliseconds: dict[Variant | None, float]


@contextlib.contextmanager
def choosing(choice: str, head_dim: int, variant: Variant | None = None) -> Iterator[None]:
    """Calls within take Hopper's own kernels ``"always"`` or ``"never"``, the forward in the tile of a variant."""
    row = configs.HOPPER["fwd", head_dim]
    if variant is not None:
        row = configs.HopperConfig(variant.block_cols, variant.num_stages, True, "timed")
    with (
        mock.patch.dict(configs.HOPPER, {("fwd", head_dim): row}),
        mock.patch.dict(os.environ, {ENVIRONMENT: choice}),
        configs.overridden(),  # nobody goes on with what was planned for another tile
    ):
        yield


def timed(
    name: str,
    layout: GistLayout,
    head_dim: int,
    variants: Iterable[Variant],
    device: str,
    heads: tuple[int, int] = HEADS,
) -> Timed:
    """One forward by the plain kernel and by each variant; the fastest of some rounds."""
    given = [tensor.detach() for tensor in _leaves(layout, head_dim, heads)[:3]]
    found: dict[Variant | None, float] = {}
    for variant in (None, *variants):
        with choosing("never" if variant is None else "always", head_dim, variant), torch.no_grad():
            found[variant] = _fastest(lambda: gist_attention(*given, layout, backend="triton"), device)
    return Timed(name, head_dim, found)


def both_passes(
    layout: GistLayout, head_dim: int, choices: Iterable[str], device: str, heads: tuple[int, int] = HEADS
) -> dict[str, float]:
    """Milliseconds of a forward and its backward, by choice of GISTKERN_HOPPER."""
    *leaves, grad_out = _leaves(layout, head_dim, heads)
    found = {}
    for choice in choices:
        with choosing(choice, head_dim):

            def call() -> tuple[torch.Tensor, ...]:
                return torch.autograd.grad(gist_attention(*leaves, layout, backend="triton"), leaves, grad_out)

            found[choice] = _fastest(call, device)
    return found


def _leaves(layout: GistLayout, head_dim: int, heads: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    made = make_inputs(layout, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=torch.bfloat16)
    return made.q, made.k, made.v, made.grad_out


def _fastest(call: Callable[[], Any], device: str) -> float:
    call()
    return 1e3 * min(spent(call, device, queued=True) for _ in range(ROUNDS))


def rows_of(
    names: Iterable[str], rows: int, heads: tuple[int, int], variants: Iterable[Variant], device: str
) -> Iterator[dict[str, Any]]:
    """Rows of a report: each layout's forward in each tile and both passes over the plain kernels; what to ship."""
    variants, times = list(variants), []
    for head_dim in sorted({variant.head_dim for variant in variants} or {64}, reverse=True):
        mine = [variant for variant in variants if variant.head_dim == head_dim]
        for name in names:
            layout, named = layout_of(name, rows).to(device), {"layout": name, "rows": rows, "head_dim": head_dim}
            times.append(timed(name, layout, head_dim, mine, device, heads))
            plain = times[-1].milliseconds[None]
            for variant, spent_here in times[-1].milliseconds.items():
                tile = "plain" if variant is None else f"{variant.block_cols} columns, {variant.num_stages} stages"
                ratio = {"milliseconds": spent_here, "of the plain": spent_here / plain}
                yield named | {"pass": "forward", "tile": tile} | ratio
            both = both_passes(layout, head_dim, ("never", "always") if mine else ("never",), device, heads)
            for choice, spent_here in both.items():
                tile = "plain" if choice == "never" else "shipped"
                ratio = {"milliseconds": spent_here, "of the plain": spent_here / both["never"]}
                yield named | {"pass": "both", "tile": tile} | ratio
    if variants:
        for key, row in pick_rows(times).items():
            yield {"layout": "all", "head_dim": key[1], "pass": "forward", "tile": repr(row)}


def pick_rows(times: Iterable[Timed]) -> dict[tuple[str, int], configs.HopperConfig]:
    """The variant with the least sum of times, each over the plain kernel's; chosen where no layout loses."""
    rows = {}
    times = list(times)
    for head_dim in sorted({one.head_dim for one in times}):
        mine = [one for one in times if one.head_dim == head_dim]
        shares = {
            variant: [one.milliseconds[variant] / one.milliseconds[None] for one in mine]
            for variant in mine[0].milliseconds
            if variant is not None
        }
        best = min(shares, key=lambda variant: sum(shares[variant]))
        wins = max(shares[best]) <= 1
        why = f"{min(shares[best]):.2f} to {max(shares[best]):.2f} of the plain kernel's time"
        rows["fwd", head_dim] = configs.HopperConfig(best.block_cols, best.num_stages, wins, why)
    return rows


def main() -> None:
    """Time all, print a row at a time."""
    print(torch.cuda.get_device_name())
    for row in rows_of(NAMES, ROWS, HEADS, VARIANTS, "cuda"):
        print(row, flush=True)


if __name__ == "__main__":
    main()
