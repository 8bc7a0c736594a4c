"""The console command ``gistkern`` (``python -m gistkern`` is the same): one file for each of its commands."""
