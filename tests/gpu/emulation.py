"""How the kernels are executed in this process, and tiles small enough for an emulator."""

import os

from gistkern.kernels import configs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = os.environ.get("GISTKERN_EMULATED") == "1"
SANITIZED = EMULATED and not INTERPRETED


def tiles(block_rows, block_cols, two_loops=False):
    one = configs.Config(block_rows, block_cols, num_warps=4, num_stages=2, why="test", two_loops=two_loops)
    return dict.fromkeys(configs.KERNELS, one)
