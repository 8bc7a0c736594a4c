"""How much memory a model, its caches and a training step take, calculated from a configuration (docs/memory.md)."""

from gistkern.memory.inference import cache_bytes, gist_rows, reading_bytes, tokens_per_call
from gistkern.memory.parts import Linear, Parts, parts_of
from gistkern.memory.terms import Precision, weight_bytes
from gistkern.memory.training import OPTIMIZERS, ROWS, WEIGHTS, MemoryEstimate, TrainingSetup, estimate

__all__ = [
    "OPTIMIZERS",
    "ROWS",
    "WEIGHTS",
    "Linear",
    "MemoryEstimate",
    "Parts",
    "Precision",
    "TrainingSetup",
    "cache_bytes",
    "estimate",
    "gist_rows",
    "parts_of",
    "reading_bytes",
    "tokens_per_call",
    "weight_bytes",
]
