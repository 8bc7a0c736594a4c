"""Times Hopper's own forward in each tile that is compiled in, beside the plain kernel, and says what to ship.

    python -m bench.gpu.hopper       # on an H100 or H200; two minutes, estimated

What it prints last are rows for `HOPPER` in kernels/configs.py. No GPU has run it; ttsem has, where times mean nothing.
"""

import os
from collections.abc import Iterable
from typing import NamedTuple
from unittest import mock

import torch

from bench.markdown import table
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


def timed(name: str, layout: GistLayout, head_dim: int, variants: Iterable[Variant], device: str) -> Timed:
    """One forward by the plain kernel and by each variant; the fastest of some rounds."""
    inputs = make_inputs(layout, heads=HEADS[0], kv_heads=HEADS[1], head_dim=head_dim, dtype=torch.bfloat16)
    given = [tensor.detach() for tensor in (inputs.q, inputs.k, inputs.v)]
    found: dict[Variant | None, float] = {}
    for variant in (None, *variants):
        row = configs.HOPPER["fwd", head_dim]
        if variant is not None:
            row = configs.HopperConfig(variant.block_cols, variant.num_stages, True, "timed")
        choice = {ENVIRONMENT: "never" if variant is None else "always"}
        with (
            mock.patch.dict(configs.HOPPER, {("fwd", head_dim): row}),
            mock.patch.dict(os.environ, choice),
            configs.overridden(),  # nobody goes on with what was planned for another tile
            torch.no_grad(),
        ):

            def call() -> torch.Tensor:
                return gist_attention(*given, layout, backend="triton")

            call()
            found[variant] = 1e3 * min(spent(call, device, queued=True) for _ in range(ROUNDS))
    return Timed(name, head_dim, found)


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
    """Time all, print a table and the rows."""
    times = []
    for head_dim in sorted({variant.head_dim for variant in VARIANTS}):
        variants = [variant for variant in VARIANTS if variant.head_dim == head_dim]
        for name in NAMES:
            times.append(timed(name, layout_of(name, ROWS).to("cuda"), head_dim, variants, "cuda"))
            for variant, spent_here in times[-1].milliseconds.items():
                print(name, head_dim, variant and tuple(variant[1:]), f"{spent_here:.3f} ms", flush=True)
    print(torch.cuda.get_device_name())
    print(table(["row", "config"], [[str(key), repr(row)] for key, row in pick_rows(times).items()], 1))


if __name__ == "__main__":
    main()
