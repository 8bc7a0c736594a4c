"""Benchmarks and compiled-code reports; run from the repository root, as `python -m bench.<name>`."""
