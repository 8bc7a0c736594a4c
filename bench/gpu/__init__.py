"""Everything that is worth minutes of a GPU, in order of priority: `make gpu` (docs/internals/gpu-run.md)."""
