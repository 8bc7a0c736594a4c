"""Memory of a model, its caches and a training step, calculated from a configuration (docs/guides/memory.md)."""

from gistkern.memory.inference import cache_bytes, gist_rows, reading_bytes, tokens_per_call
from gistkern.memory.needs import CARDS, RESERVE, Needs, Plan, needs
from gistkern.memory.parts import Linear, Parts, parts_of
from gistkern.memory.terms import Precision, weight_bytes
from gistkern.memory.training import OPTIMIZERS, ROWS, WEIGHTS, MemoryEstimate, TrainingSetup, estimate

__all__ = [
    "CARDS",
    "OPTIMIZERS",
    "RESERVE",
    "ROWS",
    "WEIGHTS",
    "Linear",
    "MemoryEstimate",
    "Needs",
    "Parts",
    "Plan",
    "Precision",
    "TrainingSetup",
    "cache_bytes",
    "estimate",
    "gist_rows",
    "needs",
    "parts_of",
    "reading_bytes",
    "tokens_per_call",
    "weight_bytes",
]
