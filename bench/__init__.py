"""Numbers by grade of evidence; run from the repository root, as `python -m bench.<folder>.<name>`."""
