"""Training with batches that divide into shares evenly or not, by one process (imported) or several (torchrun)."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from presets import preset
from ranks import Ranks
from train_niah import train

# the second leaves a micro-batch of two processes with samples for one of them
BATCHES = (8, 3)


def run(folder, batch, ranks, accumulate):
    """The smoke preset with so many samples in a batch."""
    settings = preset("smoke")
    stages = tuple(replace(stage, batch_size=batch, steps=2) for stage in settings.stages)
    train(replace(settings, stages=stages), 0, folder, ranks=ranks, accumulate=accumulate)


if __name__ == "__main__":
    ranks = Ranks.started()
    for batch in BATCHES:
        for name in ("ddp", "fsdp"):
            run(Path(sys.argv[1]) / f"{name}-{batch}", batch, replace(ranks, sharded=name == "fsdp"), accumulate=2)
    ranks.leave()
