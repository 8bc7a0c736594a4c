"""The console command: ``gistkern doctor | compress | ask | train | eval | bench`` (``python -m gistkern`` is the same)."""
